"""Figure of a critical point: the loss along its direction of least curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, legend_above, new_axes, to_numpy
from analysis.show.wording import between, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.critical.results import CriticalPoint

__all__ = ["plot_escape"]


def plot_escape(point: CriticalPoint, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the loss along the direction of least curvature and its quadratic model.

    Args:
        point: from `critical_points`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    steps, losses, model = (to_numpy(t) for t in (point.escape.steps, point.escape.losses, point.escape.model))
    color = colors.negative if point.escape.curvature < 0 else colors.positive
    ax.plot(steps, model, color=colors.quiet, linewidth=1.2, linestyle=(0, (3, 2)), label="second order")
    ax.plot(steps, losses, "o-", color=color, linewidth=1.6, markersize=3.5, label="loss")
    ax.plot([0], [point.loss], "D", color=colors.outlier, markersize=6, label=f"{point.kind}")
    span = float(np.nanmax(losses) - np.nanmin(losses)) or max(abs(point.loss), 1e-12)
    ax.set_ylim(float(np.nanmin(losses)) - 0.15 * span, float(np.nanmax(losses)) + 0.15 * span)
    text = f"u'Hu = {quantity(point.lowest, 3)}\nnegative: {between(point.index)}"
    below = point.escape.curvature < 0  # where the loss leaves room
    ax.text(0.5, 0.04 if below else 0.96, text, transform=ax.transAxes, ha="center", va="bottom" if below else "top")
    ax.set(xlabel="step along the eigenvector u", ylabel="loss")
    legend_above(ax, columns=3)
    return ax
