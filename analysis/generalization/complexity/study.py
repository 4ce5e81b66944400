"""`curvature complexity`: how many examples a training procedure fits, and in which regime a training lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from analysis.generalization.complexity.figures import plot_model_complexity
from analysis.generalization.complexity.measure import ComplexityPlan, effective_model_complexity, usual_trainings
from analysis.generalization.complexity.results import EffectiveModelComplexity
from analysis.generalization.descent.measure import setup
from analysis.generalization.ensemble import Ensemble, seconds_of_step
from analysis.generalization.width import at_width
from analysis.run.pool import workers_of
from analysis.run.study import Price, Study, StudyRun
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "ComplexityRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ComplexityRun(StudyRun):
    """A search for the effective model complexity, and what produced it."""

    kind: ClassVar[str] = "complexity"
    result: ClassVar[str] = "complexity"

    complexity: EffectiveModelComplexity
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.complexity)


def _price(objective: Objective, plan: ComplexityPlan, test_data: Any = None) -> Price:
    shared = setup(objective, plan.training, torch.Generator(), test_data)
    ensemble = Ensemble(shared.model if plan.width is None else at_width(shared.model, plan.width), range(plan.repeats))
    half = len(shared.data.labels) // 2 + 1  # a usual number of examples
    data = shared.data.inputs[:half], shared.noisy[:, :half]
    each = plan.steps * seconds_of_step(ensemble, shared.loss, *data, plan)
    count = workers_of(plan.processes, 3)
    usual = usual_trainings(len(shared.data.labels), plan.resolution)
    text = f"about {usual} trainings of {wording.count(plan.repeats)} networks, {wording.duration(each)} each"
    return Price(text, usual * each / count, total=usual, unit="trainings")


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: EffectiveModelComplexity) -> Report:
    count = wording.count
    return Report(
        title="Effective model complexity",
        facts=(
            f"{count(found.num_params)} parameters, {count(found.available)} training examples",
            f"{100 * found.label_noise:g}{wording.THIN}% label noise, {found.loss}, {count(found.steps)} steps",
        ),
        cards=(
            Card(label="Complexity", value=count(found.value), error=between(found), hint="examples that are fitted"),
            Card(label="Regime", value=found.regime, hint=f"trained on {count(found.samples)} examples"),
        ),
        findings=_findings(found),
        sections=(_curve(found),),
        terms=_TERMS,
        method=(
            "Numbers of examples are tried a factor of 2 apart and halved around three crossings: of the mean training "
            "error over seeds with epsilon, and of both ends of Student's interval of that mean. The interval of the "
            "complexity is what lies between the last two. Seeds are the same at every number."
        ),
        notes=found.notes,
    )


def between(found: EffectiveModelComplexity) -> str:
    """Return the interval in words."""
    low = wording.count(found.lower)
    if not math.isfinite(found.upper):
        return f"{low} or more"
    high = wording.count(found.upper)
    return f"{low} to {high}" if found.lower > 0 else f"below {high}"


def _findings(found: EffectiveModelComplexity) -> tuple[Finding, ...]:
    count, percent = wording.count, f"{100 * found.epsilon:g}{wording.THIN}%"
    if found.value > 0:
        fitted = (
            f"{count(found.value)}: with so many the mean training error is at most {percent}, wrong labels included "
            f"({between(found)}, {100 * found.confidence:g}{wording.THIN}% over seeds). It has "
            f"{count(found.num_params)} parameters, {wording.number(found.num_params / found.value, 2)} for each."
        )
    else:
        fitted = f"Fewer than {count(found.counts[0])}, the fewest that were tried."
    if not math.isfinite(found.upper):
        fitted += f" There are {count(found.available)} examples; whether it could fit more is not known."
    if found.diverged:
        trainings = f"{count(found.diverged)} of {count(len(found.rows))} trainings"
        fitted += (
            f" {trainings} diverged, and their numbers of examples count as not fitted: this is what diverges, not "
            "what is too small. Lower the learning rate."
        )
    says = {
        "unknown": "trainings diverged, so that nothing follows. Lower the learning rate.",
        "over-parametrised": "it can fit more examples than it is given. A larger model, or a longer training, should "
        "lower the test error further.",
        "under-parametrised": "it cannot fit the examples it is given. A larger model should lower the test error; so "
        "should more examples.",
        "critical": "it can just fit the examples it is given, as far as the seeds tell. Here a larger model, a longer "
        "training or even more examples may raise the test error, and label noise hurts most.",
    }
    regime = f"{found.regime[0].upper()}{found.regime[1:]}: on {count(found.samples)} examples {says[found.regime]}"
    conjecture = "" if found.regime == "unknown" else " This is a conjecture of Nakkiran et al. (2019), not a theorem."
    return (
        Finding("How many examples can this training fit?", fitted),
        Finding("In which regime is it?", f"{regime}{conjecture}"),
    )


def _curve(found: EffectiveModelComplexity) -> Section:
    number = wording.number
    mean, low, high = found.reach()
    test = {n: [row.test_error for row in found.rows if row.num_samples == n] for n in found.counts}
    loss = {n: [row.train_loss for row in found.rows if row.num_samples == n] for n in found.counts}
    rows = tuple(
        (
            wording.count(float(n)),
            number(float(mean[i]), 3),
            f"{number(max(0.0, float(low[i])), 2)} to {number(float(high[i]), 2)}",
            number(sum(loss[n]) / len(loss[n]), 2),
            number(sum(test[n]) / len(test[n]), 3),
        )
        for i, n in enumerate(found.counts)
    )
    interval = f"{100 * found.confidence:g}{wording.THIN}%"
    return Section(
        title="Training error against examples",
        figures=(
            Figure(
                name="complexity",
                label="Training error against the number of training examples.",
                caption=f"Band: {interval} of the mean over seeds. Shaded: where it and epsilon leave the complexity.",
                draw=lambda ax, colors: plot_model_complexity(found, ax=ax, colors=colors),
                height=3.2,
            ),
        ),
        tables=(
            Table(
                caption="All numbers of examples that were tried, means over seeds.",
                columns=("examples", "training error", interval, "training loss", "test error"),
                rows=rows,
                on_screen=False,
            ),
        ),
    )


_TERMS = (
    ("Effective model complexity", "The most examples that a training procedure fits to a training error of epsilon."),
    ("Over-parametrised", "The complexity lies above the number of examples: they are fitted with room to spare."),
    ("Critical", "The number of examples lies within the interval of the complexity."),
    ("Label noise", "The probability that a training label is another class; wrong labels have to be fitted, too."),
)


STUDY = Study(
    record=ComplexityRun,
    plan=ComplexityPlan,
    measure=effective_model_complexity,
    price=_price,
    unit="trainings",
    resumable=True,
    held_out=True,
)
