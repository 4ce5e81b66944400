"""Figures of learning rates: loss against rate, and the threshold along the steps, from results alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.learning_rate.results import Branch, LearningRateRange

__all__ = ["plot_learning_rates", "plot_threshold"]

_TOP = 3.0  # times the loss at the start: what lies above is drawn there


def plot_learning_rates(result: LearningRateRange, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the loss at the end of each branch against its rate, with the best rates and the largest stable one.

    Args:
        result: from `critical_learning_rate`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    whole = [b for b in result.branches if b.steps == result.steps]
    start = sum(b.start for b in whole) / len(whole) if whole else math.nan
    within = [b.loss for b in whole if b.loss <= _TOP * abs(start)]
    top = _TOP * abs(start) if len(within) < len(whole) else 1.2 * max([*within, start], default=1.0)
    for warm, color, label in ((False, colors.positive, "branches"), (True, colors.outlier, "with warm-up")):
        chosen = [b for b in whole if (b.warmup > 0) == warm]
        shown = [b for b in chosen if b.loss <= top]
        ax.plot([b.lr for b in shown], [b.loss for b in shown], "s" if warm else "o", color=color, ms=5, label=label)
        beyond = [b.lr for b in chosen if not b.loss <= top]
        ax.plot(beyond, [top] * len(beyond), "^", color=color, ms=6, clip_on=False, label="_beyond")
        if not warm:
            _joined(ax, shown, color)
    ax.axhline(start, color=colors.quiet, linewidth=0.9, linestyle=":", label="loss at the start")
    if math.isfinite(result.upper):
        ax.axvspan(
            result.lower, result.upper, color=colors.negative, alpha=0.25, linewidth=0, label="largest stable rate"
        )
    if result.best:
        ends = [result.best_lower, result.best_upper]
        inside = [x for x in ends if x > 0 and math.isfinite(x)]
        low, high = (ends[0] or min(result.best)), (ends[1] if len(inside) == 2 else max(result.best))
        ax.axvspan(low, high, color=colors.outlier, alpha=0.18, linewidth=0, label="best rate")
    ax.set_xscale("log")
    ax.set_yscale("log")
    if whole:
        ax.set_ylim(0.7 * min(b.loss for b in whole), 1.05 * top)
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    ax.set(xlabel="learning rate", ylabel="loss at the end")
    legend_above(ax, columns=3)
    return ax


def _joined(ax: Axes, branches: list[Branch], color: str) -> None:
    """Join the branches of each seed."""
    for seed in sorted({b.seed for b in branches}):
        own = sorted((b for b in branches if b.seed == seed), key=lambda b: b.lr)
        ax.plot([b.lr for b in own], [b.loss for b in own], "-", color=color, linewidth=1.0, alpha=0.6, label="_seed")


def plot_threshold(result: LearningRateRange, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the rates at which a step is not stable any more along a training at the best rate.

    Args:
        result: from `critical_learning_rate` with `warmup`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    steps = [point.step + 1 for point in result.threshold]
    series = (("critical", colors.positive, "-", "o", "critical step"), ("edge", colors.negative, "--", "s", "edge"))
    for name, color, style, marker, label in series:
        values = np.array([getattr(point, name) for point in result.threshold], dtype=float)
        if np.isfinite(values).any():
            label = "edge, P fixed" if name == "edge" else label
            ax.plot(steps, values, linestyle=style, marker=marker, ms=4, color=color, linewidth=1.6, label=label)
    if result.best:
        ax.axhline(result.best[0], color=colors.outlier, linewidth=1.2, linestyle=":", label="this training")
    if math.isfinite(result.upper):
        ax.axhspan(result.lower, result.upper, color=colors.quiet, alpha=0.25, linewidth=0, label="largest stable")
    ax.set_xscale("log")
    ax.set_yscale("log")
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    ax.set(xlabel="step", ylabel="learning rate")
    legend_above(ax, columns=2)
    return ax
