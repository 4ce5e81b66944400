"""What the numbers of an inspection mean, in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

from analysis.inspection.results import Inspection, LayerCurvature
from analysis.records.measured import Measured
from analysis.show.report import Finding
from analysis.show.wording import THIN, count, number, quantity, share

__all__ = ["findings"]


def findings(inspection: Inspection) -> tuple[Finding, ...]:
    """Answer what the curvature says: how sharp, is it a minimum, how ill-conditioned, where, and how large a step."""
    answers = [
        Finding("How sharp is the loss?", _sharpness(inspection)),
        Finding("Is this a minimum?", _minimum(inspection)),
        Finding("How ill-conditioned is it?", _conditioning(inspection)),
        Finding("How large a step is stable?", _step(inspection)),
    ]
    if inspection.layers:
        answers.insert(3, Finding("Which layers matter?", _layers(inspection.layers)))
    return tuple(answers)


def _sharpness(inspection: Inspection) -> str:
    k, n, trace = len(inspection.top.eigenvalues), inspection.num_params, float(inspection.trace.value)
    top = inspection.sharpness
    text = f"The largest curvature over {count(n)} dimensions is λ = {quantity(top)}."
    if math.isfinite(top.data_stderr):
        text += (
            f" Other data of the same size would change it by about {number(top.data_stderr, 2)} (one standard error)."
        )
    if 1 < k < n and trace > 0:
        held = 100 * float(inspection.top.eigenvalues.sum()) / trace
        text += f" The {k} largest eigenvalues add up to {held:.0f}{THIN}% of the trace"
        text += f"; the mean eigenvalue is {number(trace / n, 2)}."
    return text


def _minimum(inspection: Inspection) -> str:
    low, top = inspection.lowest, inspection.sharpness
    doubt = max(low.stderr, 1e-6 * abs(top.value))  # residual, or rounding
    smallest = f"smallest eigenvalue {quantity(low)}"
    if low.value < -doubt:
        beside = f", {100 * abs(low.value / top.value):.2g}{THIN}% of the largest in magnitude" if top.value > 0 else ""
        text = f"Not strictly: along at least one direction the curvature is negative ({smallest}{beside})."
        text += f" Negative eigenvalues hold {share(inspection.negative_share)} of the absolute curvature Σ|λ|."
    elif low.value > doubt:
        text = f"The curvature is positive along every direction that was found ({smallest})."
    else:
        text = f"No curvature was found that is negative beyond its own uncertainty ({smallest})."
    text += f" The gradient has norm {number(inspection.gradient_norm, 3)}"
    if top.value > 0 and inspection.loss > 0:
        gain = 100 * inspection.gradient_norm**2 / (2 * top.value * inspection.loss)
        text += f": to second order, a step of 1/λ against it lowers the loss by at least {number(gain, 2)}{THIN}%"
    return text + "."


def _conditioning(inspection: Inspection) -> str:
    condition, mean = inspection.effective_condition, inspection.mean_absolute_eigenvalue
    if not math.isfinite(condition.value):
        return "There is no curvature: every eigenvalue is zero."
    return (
        f"The largest curvature is {quantity(condition)} times the average over all directions (mean of |λ|: "
        f"{quantity(mean)}). The larger this ratio, the slower gradient descent is along most directions."
    )


def _layers(layers: tuple[LayerCurvature, ...]) -> str:
    sharpest = max(layers, key=lambda layer: layer.top)
    worst, as_bad = _largest(layers, lambda layer: layer.effective_condition)
    text = f"{sharpest.name} is the sharpest on its own (λ = {number(sharpest.top, 3)})"
    total = sum(layer.trace.value for layer in layers)
    if total > 0:
        heaviest, as_heavy = _largest(layers, lambda layer: layer.trace)
        text += " and" if heaviest is sharpest else f", {heaviest.name}"
        text += f" has the largest share of the trace ({100 * heaviest.trace.value / total:.0f}{THIN}%{as_heavy})"
    condition = f"λ is {quantity(worst.effective_condition)} times its mean |λ|{as_bad}"
    return f"{text}, and {worst.name} is the worst conditioned ({condition})."


def _largest(
    layers: tuple[LayerCurvature, ...], of: Callable[[LayerCurvature], Measured]
) -> tuple[LayerCurvature, str]:
    """Return the layer with the largest number, and which other one may have a larger."""

    def value(layer: LayerCurvature) -> float:
        return of(layer).value if math.isfinite(of(layer).value) else -math.inf

    first, *others = sorted(layers, key=value, reverse=True)
    least = of(first).interval()[0]
    rival = next((layer for layer in others if of(layer).interval()[1] > least), None)
    return first, "" if rival is None else f"; {rival.name} is within the error"


def _step(inspection: Inspection) -> str:
    lr = inspection.max_stable_lr
    if not math.isfinite(lr.value):
        return "No curvature is positive, so it sets no bound on the step."
    heavy_ball = Measured(value=1.9 * lr.value, stderr=1.9 * lr.stderr)  # (2 + 2 beta) / lambda with beta = 0.9
    return (
        f"Full-batch gradient descent is stable up to a learning rate of 2/λ = {quantity(lr, 3)}, with heavy-ball "
        f"momentum 0.9 up to {quantity(heavy_ball, 3)}. Beyond that, the iterates of the quadratic model diverge "
        "along the sharpest direction."
    )
