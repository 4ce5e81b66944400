"""Figures of effective dimensions, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.dimension.results import EffectiveDimension

__all__ = ["NAMES", "plot_dimension_of"]

NAMES = {"ggn": "Gauss-Newton", "hessian": "Hessian", "kernel": "kernel J J'"}


def plot_dimension_of(result: EffectiveDimension, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot effective dimensions against the regulariser, with the intervals of probes and quadrature.

    Args:
        result: from `effective_dimension`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    x = to_numpy(result.regularisers)
    paint = {"ggn": (colors.positive, "-"), "hessian": (colors.negative, "--"), "kernel": (colors.outlier, "-.")}
    for found in result.matrices:
        color, style = paint[found.matrix]
        ax.fill_between(x, to_numpy(found.lower), to_numpy(found.upper), color=color, alpha=0.2, linewidth=0)
        ax.plot(x, to_numpy(found.values), style, color=color, linewidth=1.6, label=NAMES[found.matrix])
    ax.axhline(result.num_params, color=colors.quiet, linewidth=0.9, linestyle=":", label="parameters")
    ax.set_xscale("log")
    ax.set_yscale("log")
    least = min(float(found.values.clamp_min(0.1).min()) for found in result.matrices)
    ax.set_ylim(0.8 * least, 1.4 * result.num_params)
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    ax.set(xlabel="regulariser α", ylabel="effective dimension")
    legend_above(ax, columns=4)
    return ax
