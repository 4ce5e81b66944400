"""`curvature lr`: the largest stable learning rate, the best one, and what a warm-up does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from analysis.learning_rate.figures import plot_learning_rates, plot_threshold
from analysis.learning_rate.measure import LearningRatePlan, branches_expected, critical_learning_rate
from analysis.learning_rate.results import KEPT, LearningRateRange, WarmUp
from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "LearningRateRun"]

_ALIKE = 1.5  # factors below this are within what the branches resolve


@dataclass(frozen=True, kw_only=True, repr=False)
class LearningRateRun(StudyRun):
    """A search for learning rates, and what produced it."""

    kind: ClassVar[str] = "lr"
    result: ClassVar[str] = "rates"

    rates: LearningRateRange
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.rates)


def _price(objective: Objective, plan: LearningRatePlan) -> Work:
    share = 1.0
    if plan.batch_size is not None:
        share = min(1.0, plan.batch_size / max(objective.total_weight, 1.0))
    readings = 3 * math.log(plan.steps) if plan.warmup else 1
    work = {"adahessian": 4, "soap": 1.5}.get(plan.optimizer, 1)
    gradients = branches_expected(plan) * plan.steps * share * work
    return Work(gradients=gradients + 2 * readings, products=3 * readings + 5, losses=5 * readings)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: LearningRateRange) -> Report:
    sections = [_losses(found)]
    if found.threshold:
        sections.append(_thresholds(found))
    count = wording.count
    return Report(
        title="Learning rates",
        facts=(
            f"{found.optimizer}, {count(found.steps)} steps",
            f"{count(len(found.branches))} branches, {count(found.num_steps)} steps in all",
        ),
        cards=_cards(found),
        findings=_findings(found),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            "Every branch trains from the same start with one rate. It is unstable where a loss is not finite or above "
            "a million times the start (or 1, if that is larger), or where the mean training loss of its last quarter "
            "has not kept "
            f"{100 * KEPT:g} % of the fall that the best branch of the same seed and length made. A survey of short "
            "branches around the critical step of the first update finds where to look; branches of all steps decide."
        ),
        notes=found.notes,
    )


def _cards(found: LearningRateRange) -> tuple[Card, ...]:
    if not found.best:
        return (Card(label="Largest stable rate", value="undefined", hint="no rate lowered the loss"),)
    seeds = len(found.best)
    over = f"over {wording.count(seeds)} seeds" if seeds > 1 else "of one seed"
    cards = [
        Card(label="Largest stable rate", value=_between(found.lower, found.upper), hint=over),
        Card(label="Best rate", value=_between(found.best_lower, found.best_upper), hint="where the loss ends lowest"),
    ]
    if math.isfinite(found.headroom):
        hint = "largest stable rate over the best one"
        cards.append(Card(label="Headroom", value=wording.number(found.headroom, 2), hint=hint))
    warm = found.warmup
    if warm is not None and math.isfinite(warm.lower):
        hint = f"largest stable rate, warm-up of {wording.count(warm.steps)} steps"
        cards.append(Card(label="With warm-up", value=_between(warm.lower, warm.upper), hint=hint))
    return tuple(cards)


def _findings(found: LearningRateRange) -> tuple[Finding, ...]:
    if not found.best:
        return (Finding("What is the largest stable learning rate?", "None was found: no rate lowered the loss."),)
    number = wording.number
    seeds = f" ({wording.count(len(found.best))} seeds)" if len(found.best) > 1 else ""
    if math.isfinite(found.upper):
        low, high = number(min(found.seed_lower), 2), number(max(found.seed_upper), 2)
        stable = (
            f"Between {number(found.lower, 2)} and {number(found.upper, 2)}. Trainings of "
            f"{wording.count(found.steps)} steps ended well below their start up to a rate of {low}{seeds}, and no "
            f"longer from {high} on."
        )
        if len(found.best) > 1:
            stable += " Other seeds may differ: the interval is wider by one step of the search on either side."
    else:
        stable = f"At least {number(found.lower, 2)}{seeds}; not for every seed was a rate found that is unstable."
    middle = math.exp(sum(math.log(lr) for lr in found.best) / len(found.best))
    best = f"About {number(middle, 2)}, within {_between(found.best_lower, found.best_upper)}."
    if found.headroom > _ALIKE:
        best += (
            f" That is {number(found.headroom, 2)} times below the largest stable rate: do not train at that one, it "
            "is where training breaks."
        )
    told = [Finding("What is the largest stable learning rate?", stable), Finding("Which rate trains best?", best)]
    if found.warmup is not None:
        told.append(Finding("Does a warm-up help?", _warm(found, found.warmup)))
    if found.estimates and math.isfinite(found.upper):
        middle = math.sqrt(found.lower * found.upper)
        said = "; ".join(f"{e.name}: {number(e.lr, 2)}, {_off(e.lr, middle)}" for e in found.estimates)
        text = f"{said[0].upper()}{said[1:]}. They cost a step and are no answer; the branches are."
        told.append(Finding("What would an estimate have said?", text))
    return tuple(told)


def _off(lr: float, middle: float) -> str:
    factor = max(lr / middle, middle / lr)
    if factor < _ALIKE:
        return "about right"
    return f"{wording.number(factor, 2)} times too {'high' if lr > middle else 'low'}"


def _warm(found: LearningRateRange, warm: WarmUp) -> str:
    number, length = wording.number, wording.count(warm.steps)
    if math.isnan(warm.rise):
        seen = f"The threshold was not measured; a tenth of the training was tried, {length} steps."
    elif warm.rise > 1.2:
        seen = (
            f"The rate at which a step is no longer stable rises {number(warm.rise, 2)} times along a training at the "
            f"best rate, most of it within {length} steps."
        )
    else:
        seen = (
            "The rate at which a step is no longer stable does not rise along a training at the best rate; a tenth of "
            f"the training was tried all the same, {length} steps."
        )
    if not math.isfinite(warm.lower):
        return f"{seen} No rate was stable with it."
    own = math.sqrt(found.seed_lower[0] * found.seed_upper[0])
    reached = math.sqrt(warm.lower * warm.upper) if math.isfinite(warm.upper) else warm.lower
    factor = reached / own
    if factor >= _ALIKE:
        said = f"With it rates up to {number(factor, 2)} times as large are stable (the first seed)"
    elif factor <= 1 / _ALIKE:
        said = f"With it the largest stable rate is {number(1 / factor, 2)} times smaller (the first seed)"
    else:
        said = "With it the largest stable rate is the same, within what the branches resolve"
    return f"{seen} {said}: {_between(warm.lower, warm.upper)}."


def _between(low: float, high: float) -> str:
    number = wording.number
    if not math.isfinite(high):
        return f"at least {number(low, 2)}"
    if low == 0:
        return f"at most {number(high, 2)}"
    return f"{number(low, 2)} to {number(high, 2)}"


def _losses(found: LearningRateRange) -> Section:
    ceiling: dict[tuple[int, int], float] = {}
    for b in found.branches:
        key = (b.seed, b.steps)
        ceiling[key] = min(ceiling.get(key, math.inf), b.loss)
    rows = tuple(
        (
            wording.number(b.lr, 3),
            wording.count(b.seed),
            wording.count(b.steps),
            wording.count(b.warmup),
            wording.count(b.taken),
            wording.number(b.loss, 3),
            "kept its fall" if b.loss <= b.start - KEPT * (b.start - ceiling[b.seed, b.steps]) else "not kept",
        )
        for b in sorted(found.branches, key=lambda b: (b.steps, b.warmup > 0, b.lr, b.seed))
    )
    return Section(
        title="Loss against rate",
        figures=(
            Figure(
                name="learning-rates",
                label="Loss at the end of each training against its learning rate, both logarithmic.",
                caption="Mean training loss of the last quarter of each whole branch; a line joins those of a seed. "
                "Triangles at the top: the loss is higher, or not finite.",
                draw=lambda ax, colors: plot_learning_rates(found, ax=ax, colors=colors),
            ),
        ),
        tables=(
            Table(
                caption="All branches. A slow rate that does not keep a tenth of the best fall is not unstable; one "
                "above the best rate is.",
                columns=("rate", "seed", "steps", "warm-up", "taken", "loss at the end", ""),
                rows=rows,
                num_prose=1,
                on_screen=False,
            ),
        ),
    )


def _thresholds(found: LearningRateRange) -> Section:
    return Section(
        title="How the threshold moves",
        figures=(
            Figure(
                name="threshold",
                label="Rates at which single steps are not stable any more, along the steps of a training.",
                caption="Critical step: the rate at which the very step leaves the loss where it was. Edge: the rate "
                "at which the largest eigenvalue of P⁻¹H is at the optimizer's limit, P as it is at that step; "
                "for Adam P adapts and trainings survive rates far above it.",
                draw=lambda ax, colors: plot_threshold(found, ax=ax, colors=colors),
            ),
        ),
    )


_TERMS = (
    ("Branch", "A short training with one learning rate, from the same start as all others of its seed."),
    ("Largest stable rate", "Beyond it a training of this length does not keep the fall of its loss."),
    ("Best rate", "The one whose training loss ends lowest; it is not the largest stable one."),
    ("Warm-up", "Steps in which the rate rises linearly to its value."),
    ("Critical step", "The rate at which a given step of the optimizer leaves the loss where it was."),
    (
        "Edge of stability",
        "Where the largest eigenvalue of P⁻¹H, P what the optimizer divides by, times lr is at the "
        "limit of a quadratic: 2 for gradient descent, 38 for Adam with β₁ = 0.9.",
    ),
)


STUDY = Study(
    record=LearningRateRun,
    plan=LearningRatePlan,
    measure=critical_learning_rate,
    price=_price,
    unit="trainings",
    resumable=True,
)
