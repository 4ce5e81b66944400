"""Figures of effective model complexity, from results alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.complexity.results import EffectiveModelComplexity

__all__ = ["plot_model_complexity"]


def plot_model_complexity(
    result: EffectiveModelComplexity, *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the training error against the number of examples, with the interval of the complexity.

    Args:
        result: from `effective_model_complexity`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    mean, low, high = result.reach()
    ax.fill_between(result.counts, low, high, color=colors.positive, alpha=0.2, linewidth=0)
    ax.plot(result.counts, mean, "o-", ms=4, color=colors.positive, linewidth=1.6, label="training error")
    ax.axhline(result.epsilon, color=colors.quiet, linewidth=0.9, linestyle=":", label="ε")
    upper = result.upper if math.isfinite(result.upper) else float(result.counts[-1])
    if result.lower > 0:
        ax.axvspan(result.lower, upper, color=colors.negative, alpha=0.2, linewidth=0, label="complexity")
    ax.axvline(result.samples, color=colors.outlier, linewidth=1.2, linestyle="--", label="this training")
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.set(xlabel="training examples", ylabel="training error", ylim=(-0.02 * float(np.nan_to_num(high).max()), None))
    legend_above(ax, columns=4)
    return ax
