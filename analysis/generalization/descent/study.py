"""`curvature descent`: test error along width, epochs or examples, and what curvature says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from analysis.generalization.descent.figures import axis_name, plot_descent, plot_descent_curvature
from analysis.generalization.descent.findings import findings
from analysis.generalization.descent.measure import DescentPlan, double_descent, setup, values_of
from analysis.generalization.descent.results import DescentCurve
from analysis.generalization.ensemble import Ensemble, seconds_of_step
from analysis.generalization.point import seconds_at
from analysis.generalization.width import at_width
from analysis.records.measured import Measured
from analysis.run.pool import workers_of
from analysis.run.study import Price, Study, StudyRun
from analysis.show import wording
from analysis.show.report import Card, Figure, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "DescentRun"]

_CURVATURE = ("effective_dimension", "condition", "trace", "sharpness")


@dataclass(frozen=True, kw_only=True, repr=False)
class DescentRun(StudyRun):
    """A curve of trainings, and what produced it."""

    kind: ClassVar[str] = "descent"
    result: ClassVar[str] = "descent"

    descent: DescentCurve
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.descent)


def _price(objective: Objective, plan: DescentPlan, test_data: Any = None) -> Price:
    """Time a few steps of the smallest and the largest network, and take the rest to lie between."""
    shared = setup(objective, plan, torch.Generator(), test_data)
    if plan.model != "task":
        return Price("least squares, solved at once", 2e-10 * plan.repeats * len(values_of(shared)) * plan_size(shared))
    values = values_of(shared)
    data, seconds, of_point = shared.data, [], []
    for value in (values[0], values[-1]) if plan.vary == "width" else (plan.width,):
        model = shared.model if value is None else at_width(shared.model, value)
        ensemble = Ensemble(model, range(plan.repeats))
        seconds.append(seconds_of_step(ensemble, shared.loss, data.inputs, shared.noisy, plan))
        of_point.append(seconds_at(model, data.num_classes * len(data.labels)))
    trainings = 1 if plan.vary == "epochs" else len(values) + (3 if plan.vary == "width" and not plan.values else 0)
    points = len(values) * plan.repeats if plan.curvature else 0
    processes = workers_of(plan.processes, trainings if plan.vary != "epochs" else plan.repeats)
    each = sum(seconds) / len(seconds) * plan.steps
    total = (trainings * each + points * sum(of_point) / len(of_point)) / processes
    count = wording.count
    text = f"about {count(trainings)} trainings of {count(plan.repeats)} networks, {wording.duration(each)} each"
    return Price(f"{text}, in {count(processes)} processes", total, total=trainings, unit="trainings")


def plan_size(shared: Any) -> float:
    """Return the order of operations of one least-squares solution."""
    n = len(shared.data.labels)
    return float(n * n * max(n, max(values_of(shared))))


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: DescentCurve) -> Report:
    count = wording.count
    sections = [_errors(found)]
    if np.isfinite(found.of("effective_dimension")).any():
        sections.append(_curvature(found))
    sections.append(_rows(found))
    exact = found.model != "task"
    repeats = found.of("test_loss").shape[1]
    return Report(
        title="Double descent",
        facts=(
            f"{count(found.num_samples)} training examples, {count(found.num_test)} for testing",
            f"{100 * found.label_noise:g}{wording.THIN}% label noise, {found.loss}",
            f"{count(len(found.values))} values, {count(repeats)} repeats"
            + ("" if exact else f", {count(found.steps)} steps"),
        ),
        cards=_cards(found),
        findings=findings(found),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            "Each repeat draws wrong labels once, the same at every value; test labels are clean. "
            + (
                "The solution of least norm is computed by a singular value decomposition; the closed form averages "
                "over label noise, the features given."
                if exact
                else "The networks of one value start from parameters drawn anew and are trained side by side. "
                "Curvature is that of the training loss, in float64: all eigenvalues of the Gauss-Newton matrix, or of "
                "its kernel if that is smaller, up to an order of 4 000, and by stochastic quadrature beyond."
            )
            + " Condition numbers are those of J J', J the Jacobian of the outputs, over eigenvalues above the largest "
            "x size x 2.2e-16. Bands are Student's 95 % intervals over repeats; rises and falls of the peak are "
            "differences within repeats, and its place was chosen from the same numbers."
        ),
        notes=found.notes,
    )


def _cards(found: DescentCurve) -> tuple[Card, ...]:
    number, name = wording.number, axis_name(found)
    cards = []
    if (peak := found.peak("test_loss")) is not None:
        cards.append(
            Card(
                label="Peak of the test loss",
                value=wording.count(peak.value),
                error=f"{number(peak.standing, 2)} standard errors",
                hint=f"{name}; above the lowest points on both sides",
            )
        )
    else:
        cards.append(Card(label="Peak of the test loss", value="none", hint="it rises or falls all along"))
    cards.append(Card(label="Interpolation threshold", value=_threshold(found), hint=f"{name}; labels fitted"))
    mean, error = found.mean("test_error")
    best = int(np.nanargmin(mean))
    cards.append(
        Card(
            label="Lowest test error",
            value=f"{number(100 * mean[best], 3)}{wording.THIN}%",
            error=f"± {number(100 * error[best], 2)}{wording.THIN}%",
            hint=f"at {name} {wording.count(float(found.values[best]))}",
        )
    )
    if np.isfinite(found.interval("condition")[0]).any() and found.resolved().all():
        at = found.values[int(np.nanargmax(found.interval("condition")[0]))]
        cards.append(Card(label="Condition number peaks", value=wording.count(float(at)), hint=f"{name}; of J J'"))
    return tuple(cards)


def _threshold(found: DescentCurve) -> str:
    number, threshold = wording.count, found.threshold
    if threshold.found:
        return f"{number(threshold.lower)} to {number(threshold.upper)}"
    if not math.isfinite(threshold.upper):
        return f"above {number(threshold.lower)}" if threshold.lower > 0 else "not reached"
    return f"up to {number(threshold.upper)}"


def _errors(found: DescentCurve) -> Section:
    def draw(axes: Any, colors: Any) -> None:
        for ax, of in zip(axes, ("error", "loss"), strict=True):
            plot_descent(found, of=of, ax=ax, colors=colors)

    return Section(
        title="Error and loss",
        figures=(
            Figure(
                name="descent",
                label=f"Test and training error, and loss, along {axis_name(found)}.",
                caption="Left: share of wrong answers; right: loss. Bands: 95 % over repeats. Shaded: from where the "
                "repeats begin to fit all labels, wrong ones included.",
                draw=draw,
                panels=2,
                height=3.6,
            ),
        ),
    )


def _curvature(found: DescentCurve) -> Section:
    def draw(axes: Any, colors: Any, names: tuple[str, ...]) -> None:
        for ax, name in zip(axes, names, strict=True):
            plot_descent_curvature(found, name, ax=ax, colors=colors)

    captions = (
        "Left: what the data determine, and the parameters there are. Right: the condition of J J'.",
        "Of the training loss. Under cross-entropy both fall to nothing as labels are fitted.",
    )
    figures = [
        Figure(
            name=f"curvature-{i + 1}",
            label=f"{' and '.join(names).replace('_', ' ')} along {axis_name(found)}.",
            caption=captions[i],
            draw=partial(draw, names=names),
            panels=2,
            height=3.4,
        )
        for i, names in enumerate((_CURVATURE[:2], _CURVATURE[2:]))
    ]
    return Section(title="Curvature along the curve", figures=tuple(figures))


def _rows(found: DescentCurve) -> Section:
    names = ("train_loss", "train_error", "test_error", "test_loss", "effective_dimension", "condition")
    titles = ("train loss", "train error", "test error", "test loss", "eff. dimension", "condition")
    shown = [(n, t) for n, t in zip(names, titles, strict=True) if np.isfinite(found.of(n)).any() or n.startswith("t")]
    if found.model != "task":
        shown.insert(4, ("expected", "expected"))
    means = {name: found.mean(name) for name, _ in shown}
    params = found.mean("num_params")[0]
    rows = tuple(
        (
            wording.count(float(value)),
            wording.count(float(params[i])),
            *(_cell(name, float(means[name][0][i]), float(means[name][1][i])) for name, _ in shown),
        )
        for i, value in enumerate(found.values)
    )
    return Section(
        title="All points",
        tables=(
            Table(
                caption="Means over repeats, with one standard error where one stands.",
                columns=(axis_name(found), "parameters", *(title for _, title in shown)),
                rows=rows,
                on_screen=False,
            ),
        ),
    )


def _cell(name: str, mean: float, error: float) -> str:
    if not math.isfinite(mean):
        return "not known"
    if name in ("train_loss", "condition"):
        return wording.number(mean, 2)
    return wording.quantity(Measured(value=mean, stderr=error), 3)


_TERMS = (
    (
        "Double descent",
        "Test error that falls, rises to a peak where the training labels can just be fitted, and falls again.",
    ),
    (
        "Interpolation threshold",
        "Where the training error on the labels as they are, wrong ones included, becomes 0 and stays it; for least "
        "squares, where the training loss does.",
    ),
    ("Label noise", "The share of training labels that were replaced by another class; test labels are clean."),
    (
        "Effective dimension",
        "Σ λ / (λ + α), λ the eigenvalues of the Gauss-Newton matrix of the loss summed over examples.",
    ),
    ("Condition number", "Largest over smallest eigenvalue other than zero, of J J' with J the outputs' Jacobian."),
    ("Standard errors of a peak", "The smaller of its rise and its fall, over their standard errors across repeats."),
)


STUDY = Study(
    record=DescentRun,
    plan=DescentPlan,
    measure=double_descent,
    price=_price,
    unit="trainings",
    resumable=True,
    held_out=True,
)
