"""Figures of alignment: shares of vectors in the top subspace, overlaps over time, the terms of class structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.alignment.results import ClassStructure, GradientAlignment

__all__ = ["plot_alignment", "plot_class_structure", "plot_overlaps"]

_STRONGEST = 0.5  # opacity of an overlap of 1: ink on it can be read


def plot_alignment(result: GradientAlignment, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the share of gradient and updates in the span of the first j eigenvectors, beside chance.

    Args:
        result: from `gradient_alignment`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    from matplotlib.ticker import MaxNLocator

    ax, colors = new_axes(ax), colors or Colors()
    ranks = np.arange(1, len(result.eigenvalues) + 1)
    error = to_numpy(result.share_error)
    styles = [(colors.positive, "o"), (colors.outlier, "s"), (colors.negative, "^"), (colors.quiet, "v")]
    for i, vector in enumerate((result.gradient, *result.updates)):
        color, marker = styles[i % len(styles)]
        shares = to_numpy(vector.shares)
        if i == 0:
            low, high = np.clip(shares - error, 0, 1), np.clip(shares + error, 0, 1)
            ax.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0, label="± angle of the subspace")
        ax.plot(ranks, shares, marker=marker, color=color, markersize=4, linewidth=1.4, label=vector.name)
    ax.plot(ranks, to_numpy(result.chance), color=colors.quiet, linewidth=1.0, linestyle=(0, (3, 2)), label="chance")
    ax.set_ylim(-0.02, 1.05)
    ax.set_xlim(0.5, len(ranks) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="number of eigenvectors", ylabel="share of the squared norm")
    legend_above(ax, columns=4)
    return ax


def plot_overlaps(
    overlaps: Tensor, labels: Sequence[str], *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the overlap of subspaces at checkpoints as shaded cells with their values.

    Args:
        overlaps: (T, T), from `overlap_over_time`.
        labels: T names.
        ax: where to draw; a new figure by default, of a size for the table.
        colors: what to paint with.
    """
    from matplotlib.patches import Rectangle

    values, colors = to_numpy(overlaps), colors or Colors()
    T = len(values)
    side = min(2.0 + 0.55 * T, 12.0)
    ax = new_axes(ax, side, side)
    for a, b in zip(*np.tril_indices(T), strict=True):
        opacity = _STRONGEST * max(float(values[a, b]), 0.02)
        ax.add_patch(Rectangle((b - 0.47, a - 0.47), 0.94, 0.94, facecolor=colors.positive, alpha=opacity, linewidth=0))
        ax.text(float(b), float(a), f"{values[a, b]:.2f}", ha="center", va="center")
    ax.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), aspect="equal")
    ax.set_yticks(range(T), list(labels))
    ax.set_xticks(range(T), list(labels), rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def plot_class_structure(result: ClassStructure, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the eigenvalues of the class term, with the share of each term in the trace beside.

    Args:
        result: from `class_structure`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    from matplotlib.ticker import MaxNLocator

    ax, colors = new_axes(ax), colors or Colors()
    values = to_numpy(result.class_eigenvalues)
    shown = np.where(values > 0, values, np.nan)
    ax.plot(np.arange(1, len(values) + 1), shown, "o", color=colors.outlier, markersize=6, label="class term")
    ax.set_yscale("log")
    decade_ticks(ax.yaxis)
    ax.set_xlim(0.5, len(values) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    text = "\n".join(f"{name}: {100 * share:.1f} % of the trace" for name, share in result.shares.items())
    ax.text(1.02, 0.98, text, transform=ax.transAxes, va="top")
    ax.set(xlabel="rank", ylabel="eigenvalue")
    legend_above(ax, columns=1)
    return ax
