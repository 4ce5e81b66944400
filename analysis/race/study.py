"""`curvature race`: optimizers on one task with the same budget, and who is ahead beyond chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any, ClassVar

from analysis.race.course import look_seconds, step_cost
from analysis.race.figures import plot_race, plot_race_ends, plot_race_pairs, plot_race_rates, plot_race_single
from analysis.race.ground import prepare_ground
from analysis.race.measure import budgets_expected, budgets_of_entry, race_optimizers
from analysis.race.plan import RacePlan
from analysis.race.results import Race, RacePair
from analysis.race.told import cards_of, findings_of, tables_of
from analysis.run.study import Part, Price, Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Figure, Report, Section
from curvature.objective.objective import Objective

__all__ = ["STUDY", "RaceRun"]

_LOOKS = 22  # at all data, in a training
_PRODUCTS, _MOMENTS = 15, 3  # of sharpness and noise at an end


@dataclass(frozen=True, kw_only=True, repr=False)
class RaceRun(StudyRun):
    """A race, and what produced it."""

    kind: ClassVar[str] = "race"
    result: ClassVar[str] = "race"

    race: Race
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.race)


def _price(objective: Objective, plan: RacePlan, *, test_data: Any = None) -> Price | Work:
    trainings, ends = budgets_expected(plan), len(plan.entries()) * plan.seeds
    workers = plan.processes()
    if plan.limit.unit == "seconds":
        seconds = trainings * plan.limit.amount / workers
        text = f"about {wording.number(trainings, 2)} trainings of {wording.duration(plan.limit.amount)} and their ends"
        return Price(text, seconds, max(1, round(trainings)), "trainings")
    ground = prepare_ground(objective, plan, test_data=test_data, seed=0)
    costs = [step_cost(ground, entry) for entry in plan.entries()]
    failing = [entry.name for entry, cost in zip(plan.entries(), costs, strict=True) if cost.seconds == 0]
    untimed = f" (without {', '.join(failing)}: not to be timed)" if failing else ""
    gradients = [cost.gradients if plan.limit.unit == "gradients" else 1.0 for cost in costs]
    steps = [plan.limit.amount * budgets_of_entry(e, plan) / g for e, g in zip(plan.entries(), gradients, strict=True)]
    return Work(
        parts=(
            _part(
                f"training steps{untimed}", steps, [cost.seconds for cost in costs], [cost.gradients for cost in costs]
            ),
            _part("steps that are counted", [cost.counted for cost in costs], [cost.counted_seconds for cost in costs]),
            Part(_LOOKS * ends + 2 * (trainings - ends), "looks", look_seconds(ground), gradients=1 / 3),
        ),
        gradients=_MOMENTS * ends if plan.noise else 0,
        products=_PRODUCTS * ends * len(plan.sharpness()),
        workers=workers,
    )


def _part(what: str, counts: list[float], seconds: list[float], gradients: list[float] | None = None) -> Part:
    """Return all of them, at what they cost on average."""
    total = sum(counts)
    mean = [
        sum(map(mul, counts, each)) / total if total else 0.0 for each in (seconds, gradients or [2.0] * len(counts))
    ]
    return Part(total, what, *mean)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(race: Race) -> Report:
    count, rows = wording.count, len(race.raced())
    standings, equal, costs, pairs = tables_of(race)
    tall = 1.2 + 0.22 * rows
    panels = ("loss", "metric") if race.metric else ("loss",)
    sections = [
        Section(
            title="Who is ahead",
            figures=(
                Figure(
                    name="ends",
                    label="Training loss and test metric of every entrant at the end of the budget, best first.",
                    caption="Best first. Small circles are seeds, diamonds their means, bars one standard error, "
                    "crosses at the right seeds that diverged. Bars do not decide: seeds share weights and batches, "
                    "and the tests are of differences within seeds.",
                    draw=lambda axes, colors: plot_race_ends(race, panels, axes=axes, colors=colors),
                    height=tall,
                    narrow_height=len(panels) * tall,
                    panels=len(panels),
                    share_y=True,
                ),
                *_pair_figures(race),
            ),
            tables=(standings, *pairs),
        ),
        Section(
            title="Steps, seconds, gradients",
            text="Equal steps are not equal time. A step of one optimizer is several gradients of another, and its own "
            "arithmetic comes on top.",
            figures=(
                Figure(
                    name="curves",
                    label="Training loss against steps, seconds and gradients, means over seeds.",
                    caption="Means over seeds, geometric where losses are compared as logarithms. Seconds are "
                    f"{race.clock} of this machine, without the looks in between.",
                    draw=lambda axes, colors: plot_race(race, axes=axes, colors=colors),
                    height=3.2,
                    narrow_height=8.4,
                    panels=3,
                    share_y=True,
                ),
                Figure(
                    name="single",
                    label="The curve of each entrant, all seeds, in a panel of its own.",
                    caption=f"Training loss against {race.unit}, every seed; grey are the means of all others. Dotted: "
                    "it diverged.",
                    draw=lambda ax, colors: plot_race_single(race, ax=ax, colors=colors),
                    height=0.5 + 1.25 * -(-rows // 4),
                    narrow_height=0.5 + 1.15 * -(-rows // 2),
                ),
            ),
            tables=(equal, costs),
        ),
    ]
    if traits := _traits(race):
        sections.append(
            Section(
                title="What they found",
                figures=(
                    Figure(
                        name="solutions",
                        label="Sharpness and noise of the points where the trainings ended.",
                        caption="In the order of the loss. Sharpness depends on the scale of weights: between "
                        "optimizers it tells how they train on, not how well they generalise.",
                        draw=lambda axes, colors: plot_race_ends(race, traits, axes=axes, colors=colors),
                        height=tall,
                        narrow_height=len(traits) * tall,
                        panels=len(traits),
                        share_y=True,
                    ),
                ),
            )
        )
    if any(race.searches(name) for name in race.raced()):
        sections.append(
            Section(
                title="How sensitive to the rate",
                figures=(
                    Figure(
                        name="rates",
                        label="Rates that each search tried over the one it chose, and which are as good as the best.",
                        caption="The first round of each search, in which all rates have the same short part of the "
                        "budget; the most forgiving first. The band keeps nine tenths of the best fall of the loss.",
                        draw=lambda ax, colors: plot_race_rates(race, ax=ax, colors=colors),
                        height=tall,
                    ),
                ),
            )
        )
    return Report(
        title="Race of optimizers",
        facts=(
            f"{count(len(race.raced()))} optimizers, {count(race.seeds)} seeds",
            f"{count(race.budget)} {race.unit} each",
            f"batches of {count(race.batch_size)}, weights {race.start}",
        ),
        cards=cards_of(race),
        findings=findings_of(race),
        sections=tuple(sections),
        terms=_TERMS,
        method=_method(race),
        notes=race.notes,
    )


def _pair_figures(race: Race) -> tuple[Figure, ...]:
    """Return a figure of the pairs, if any is decided."""
    shown = [("training loss", race.pairs), (race.metric, race.metric_pairs)]
    shown = [(what, pairs) for what, pairs in shown if any(p.verdict != "undecided" for p in pairs)]
    if not shown:
        return ()
    size = 1.4 + 0.15 * len(race.raced())
    said = " and by ".join(what for what, _ in shown)
    return (
        Figure(
            name="pairs",
            label=f"Which entrants are ahead of which others, by {said}.",
            caption=f"By {said}: a row is ahead of a column, behind it, or undecided (dots), all pairs together at "
            f"{wording.number(100 * race.level, 2)}{wording.THIN}%.",
            draw=partial(_draw_pairs, race, tuple(pairs for _, pairs in shown)),
            height=size,
            narrow_height=len(shown) * (1.8 + 0.16 * len(race.raced())),
            panels=len(shown),
        ),
    )


def _draw_pairs(race: Race, shown: tuple[tuple[RacePair, ...], ...], axes: Any, colors: Any) -> None:
    for ax, pairs in zip(axes if len(shown) > 1 else [axes], shown, strict=True):
        plot_race_pairs(race, pairs, ax=ax, colors=colors)


def _traits(race: Race) -> tuple[str, ...]:
    names = dict.fromkeys(trait.name for course in race.courses for trait in course.traits)
    return tuple(n for n in names if any(math.isfinite(race.final(name, n).value) for name in race.raced()))


def _method(race: Race) -> str:
    number = wording.number
    scale = "logarithms of losses" if race.scale == "log" else "losses"
    searched = any(e.source == "searched" for e in race.entrants)
    chosen = (
        f"Rates were chosen by the {race.searched_by} of a seed that does not race, by successive halving; the test "
        "metric had no part in it."
    )
    return (
        "All entrants of a seed share initial weights, batches and the random numbers of each step. "
        f"{chosen if searched else 'Rates were not searched.'} "
        f"Differences of {scale} within seeds are tested by Student's t over seeds, by the sign test where a "
        "training diverged, and all pairs of a comparison together by Holm's procedure. Losses below "
        f"{number(race.floor, 2)}, the rounding of that at the start, count as equal. A training diverged where a loss "
        "was not finite or a million times that at the start (or 1), or where it ended a tenth above its start. "
        "Gradients: evaluations of the loss were counted in every training, the work of one, with all that is "
        "differentiated, once for each optimizer over its first steps: operations of its passes over those of a "
        f"forward and a backward pass of the batch. Seconds: {race.clock}, {wording.count(race.workers)} trainings at "
        "a time."
    )


_TERMS = (
    ("Undecided", "The tests do not tell the two apart: more seeds may, and it does not mean that they are equal."),
    ("Equal seconds", "Where the entrant that was through its budget first had ended; all others are cut there."),
    ("Gradient", "A forward and a backward pass of a training batch; a product with the Hessian is about two."),
    ("Sharpness", "Largest eigenvalue of the Hessian of the training loss."),
    ("Gradient noise", "Trace of the covariance Σ of the gradients of single examples."),
    ("Successive halving", "Short trainings at many rates; the better half goes on, twice as long."),
)


STUDY = Study(
    record=RaceRun,
    plan=RacePlan,
    measure=race_optimizers,
    price=_price,
    unit="trainings",
    held_out=True,
    resumable=True,
)
