"""What the numbers of an inspection mean, in sentences."""

from __future__ import annotations

import math

from analysis.inspection.results import Inspection, LayerCurvature
from analysis.records.measured import Measured
from analysis.show.report import Finding
from analysis.show.wording import THIN, count, number, quantity, share

__all__ = ["findings"]


def findings(inspection: Inspection) -> tuple[Finding, ...]:
    """Answer what the curvature says: how sharp, is it a minimum, how ill-conditioned, where, and how large a step."""
    answers = [
        Finding("How sharp is it here?", _sharpness(inspection)),
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
    text = f"Along the sharpest of {count(n)} directions the loss curves with λ = {quantity(top)}."
    if math.isfinite(top.data):
        text += f" Other data of the same size would move it by {number(top.data, 2)} or so (one standard error)."
    if 1 < k < n and trace > 0:
        held = 100 * float(inspection.top.eigenvalues.sum()) / trace
        text += f" The {k} largest eigenvalues add up to {held:.0f}{THIN}% of the trace"
        text += f"; over all directions the curvature is {number(trace / n, 2)} on average."
    return text


def _minimum(inspection: Inspection) -> str:
    low, top = inspection.lowest, inspection.sharpness
    doubt = max(low.stderr, 1e-6 * abs(top.value))  # residual, or rounding
    smallest = f"smallest eigenvalue {quantity(low)}"
    if low.value < -doubt:
        beside = f", {100 * abs(low.value / top.value):.2g}{THIN}% of the largest in size" if top.value > 0 else ""
        text = f"Not strictly: along at least one direction the curvature is negative ({smallest}{beside}), and "
        text += f"{share(inspection.negative_share)} of all absolute curvature is."
    elif low.value > doubt:
        text = f"The curvature is positive along every direction that was found ({smallest})."
    else:
        text = f"No curvature was found that is negative beyond its own uncertainty ({smallest})."
    text += f" The gradient has norm {number(inspection.gradient_norm, 3)}"
    if top.value > 0 and inspection.loss > 0:
        gain = 100 * inspection.gradient_norm**2 / (2 * top.value * inspection.loss)
        text += f": a step of 1/λ against it would lower the loss by {number(gain, 2)}{THIN}%, if not more"
    return text + "."


def _conditioning(inspection: Inspection) -> str:
    condition, mean = inspection.effective_condition, inspection.mean_absolute_eigenvalue
    if not math.isfinite(condition.value):
        return "There is no curvature: every eigenvalue is zero."
    return (
        f"The sharpest direction curves {quantity(condition)} times as much as directions do on average (mean of |λ|: "
        f"{quantity(mean)}). The larger this ratio, the fewer directions gradient descent makes headway in."
    )


def _layers(layers: tuple[LayerCurvature, ...]) -> str:
    def condition(layer: LayerCurvature) -> float:
        return layer.effective_condition.value if math.isfinite(layer.effective_condition.value) else -math.inf

    sharpest, worst = max(layers, key=lambda layer: layer.top), max(layers, key=condition)
    text = f"{sharpest.name} is the sharpest on its own (λ = {number(sharpest.top, 3)})"
    total = sum(layer.trace.value for layer in layers)
    if total > 0:
        heaviest = max(layers, key=lambda layer: layer.trace.value)
        text += " and" if heaviest is sharpest else f", {heaviest.name}"
        text += f" holds the most of the trace ({100 * heaviest.trace.value / total:.0f}{THIN}%)"
    return (
        text + f", and {worst.name} is the worst conditioned (λ is {number(condition(worst), 3)} times its mean |λ|)."
    )


def _step(inspection: Inspection) -> str:
    lr = inspection.max_stable_lr
    if not math.isfinite(lr.value):
        return "No direction curves upwards, so the curvature sets no bound on the step."
    heavy_ball = Measured(value=1.9 * lr.value, stderr=1.9 * lr.stderr)  # (2 + 2 beta) / lambda with beta = 0.9
    return (
        f"Plain gradient descent on all of these data is stable up to a learning rate of 2/λ = {quantity(lr, 3)}, with "
        f"heavy-ball momentum 0.9 up to {quantity(heavy_ball, 3)}. Beyond that the quadratic model grows along the "
        "sharpest direction."
    )
