"""Figures of double descent, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.descent.results import DescentCurve

__all__ = ["AXES", "plot_descent", "plot_descent_curvature"]

AXES = {"width": "width", "epochs": "epochs", "samples": "training examples"}
NAMES = {
    "error": "error rate",
    "loss": "loss",
    "sharpness": "sharpness",
    "trace": "trace",
    "effective_dimension": "effective dimension",
    "condition": "condition number",
    "norm": "norm of the parameters",
}


def axis_name(result: DescentCurve) -> str:
    """Return what stands along the curve."""
    return "random features" if result.model != "task" and result.vary == "width" else AXES[result.vary]


def plot_descent(
    result: DescentCurve, *, of: str = "error", ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot test and training error, or loss, with 95 % intervals over repeats and the interpolation threshold.

    Args:
        result: from `double_descent`.
        of: "error" or "loss".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    for part, color, style in (("train", colors.quiet, "--"), ("test", colors.positive, "-")):
        _line(result, f"{part}_{of}", ax, color, style, "training" if part == "train" else "test")
    if of == "loss" and result.model != "task":
        ax.plot(result.values, result.mean("expected")[0], "x", color=colors.negative, ms=6, label="closed form")
    if of == "loss":  # training loss falls by decades below what there is to see
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.3 * float(np.nanmin(result.interval("test_loss")[0])))
        decade_ticks(ax.yaxis)
    else:
        ax.set_ylim(bottom=-0.02)
    peak = result.peak(f"test_{of}")
    if peak is not None:
        ax.plot([peak.value], [peak.height], "v", color=colors.negative, ms=8, label="peak")
    return _finished(result, ax, colors, NAMES[of])


def plot_descent_curvature(
    result: DescentCurve, name: str, *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot a measure of curvature along the curve, with 95 % intervals over repeats.

    Args:
        result: from `double_descent` with `curvature`.
        name: "effective_dimension", "trace", "sharpness", "condition" or "norm".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    _line(result, name, ax, colors.outlier, "-", NAMES[name])
    if name == "effective_dimension":
        ax.plot(result.values, result.mean("num_params")[0], ":", color=colors.quiet, label="parameters")
    ax.set_yscale("log")
    decade_ticks(ax.yaxis)
    return _finished(result, ax, colors, NAMES[name])


def _line(result: DescentCurve, name: str, ax: Axes, color: str, style: str, label: str) -> None:
    middle, low, high = result.interval(name)
    ax.plot(result.values, middle, style, marker="o", ms=3.5, color=color, linewidth=1.6, label=label)
    ax.fill_between(result.values, low, high, color=color, alpha=0.2, linewidth=0)


def _finished(result: DescentCurve, ax: Axes, colors: Colors, ylabel: str) -> Axes:
    threshold = result.threshold
    if threshold.found:
        ax.axvspan(threshold.lower, threshold.upper, color=colors.negative, alpha=0.15, linewidth=0, label="threshold")
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.set(xlabel=axis_name(result), ylabel=ylabel)
    legend_above(ax, columns=2)
    return ax
