"""Figure of the error of low-rank approximations of a matrix; made as those of `analysis.inspection.figures` are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy
from analysis.show.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.inspection.results import LowRankError

__all__ = ["plot_low_rank_error"]

_MARKED = (0.5, 0.1)  # errors whose rank is written beside the curve
_FLOOR = 1e-3  # errors below are of no use to anyone and not resolved by the quadrature


def plot_low_rank_error(result: LowRankError, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the relative error of the best approximation against its rank, both logarithmic, with its uncertainty.

    Args:
        result: from `analysis.inspection.low_rank.low_rank_error`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    ranks, error, stderr = (to_numpy(t) for t in (result.ranks, result.error, result.stderr))
    if result.data is not None:
        data = to_numpy(result.data)
        for edge, label in ((error - data, "± other data"), (error + data, None)):
            shown = np.where(edge > _FLOOR / 10, edge, np.nan)
            ax.plot(ranks, shown, color=colors.quiet, linewidth=0.9, linestyle=(0, (3, 2)), label=label)
    if (stderr > 0).any():
        low = np.maximum(error - stderr, _FLOOR / 10)
        ax.fill_between(
            ranks, low, error + stderr, color=colors.quiet, alpha=0.5, linewidth=0, label="± 1 standard error"
        )
    ax.plot(ranks, np.where(error > _FLOOR / 10, error, np.nan), color=colors.positive, linewidth=1.6)
    for level in _MARKED:
        if error.min() <= level:
            rank = result.rank_for(level)
            place = (rank, float(error[ranks == rank][0]))
            ax.plot(*place, "o", color=colors.outlier, markersize=5)
            text = f"rank {count(rank)}: below {100 * level:.0f} %"
            ax.annotate(text, place, xytext=(6, 4), textcoords="offset points")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(1, max(ranks[-1], 2))
    ax.set_ylim(max(_FLOOR, 0.7 * float(np.nanmin(np.where(error > 0, error, np.nan), initial=1.0))), 1.3)
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    ax.set(xlabel="rank r", ylabel="error of the best rank r")
    legend_above(ax, columns=2)
    return ax
