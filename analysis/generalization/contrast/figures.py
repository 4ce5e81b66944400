"""Figures of trainings side by side, from results alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.contrast.results import Contrasts

__all__ = ["plot_contrast_ratios", "plot_fitting"]

MEASURES = {
    "sharpness": "sharpness",
    "trace": "trace",
    "effective_dimension": "eff. dimension",
    "noise_trace": "noise",
    "norm": "norm",
}
_STYLES = ("-", "--", "-.", ":", "-", "--", "-.")


def plot_fitting(result: Contrasts, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the training error of each condition along the steps, the mean over repeats.

    Args:
        result: from `random_labels` or `regularization_by_curvature`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    paint = (colors.positive, colors.negative, colors.outlier, "#CC79A7", "#E69F00", "#56B4E9", colors.quiet)
    for i, condition in enumerate(result.conditions):
        histories = [row.history for row in result.rows if row.condition == condition]
        longest = max(histories, key=len)
        errors = [np.array([e for _, e in h] + [h[-1][1]] * (len(longest) - len(h))) for h in histories]
        steps = [step + 1 for step, _ in longest]
        style = _STYLES[i % len(_STYLES)]
        ax.plot(steps, np.mean(errors, axis=0), style, color=paint[i % len(paint)], linewidth=1.6, label=condition)
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.set(xlabel="step", ylabel="training error", ylim=(-0.02, None))
    legend_above(ax, columns=3)
    return ax


def plot_contrast_ratios(result: Contrasts, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot measures of each condition over those of the baseline, with 95 % intervals within repeats.

    Args:
        result: from `random_labels` or `regularization_by_curvature`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    paint = (colors.positive, colors.negative, colors.outlier, "#CC79A7", colors.quiet)
    others = result.conditions[1:]
    for k, (name, label) in enumerate(MEASURES.items()):
        found = [result.ratio(name, condition) for condition in others]
        y = [i + 0.14 * (k - 2) for i in range(len(others))]
        kept = [(f, at) for f, at in zip(found, y, strict=True) if math.isfinite(f.value)]
        if kept:
            values = np.array([f.value for f, _ in kept])
            ends = np.array([[f.value - f.lower, f.upper - f.value] for f, _ in kept]).T
            place = [at for _, at in kept]
            marker = "osD^v"[k]
            ax.errorbar(values, place, xerr=ends, fmt=marker, ms=4.5, color=paint[k], linewidth=1.4, label=label)
    ax.axvline(1.0, color=colors.quiet, linewidth=0.9, linestyle=":")
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.set_yticks(range(len(others)), others)
    ax.invert_yaxis()
    ax.set(xlabel=f"over {result.conditions[0]}")
    legend_above(ax, columns=3)
    return ax
