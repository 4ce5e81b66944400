"""Figures of layers: how they act on each other, and how curvature is spread over their parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from analysis.show.drawing import Array, Colors, asinh_ticks, figure_width, layer_labels, legend_above, new_axes
from analysis.show.wording import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.inspection.results import LayerCoupling, LayerDiagonals

__all__ = ["plot_layer_coupling", "plot_layer_diagonals"]

_STRONGEST = 0.5  # opacity of a cell of value 1: ink on it can be read on light and on dark grounds
_ROOM = 0.36  # inches of a cell that has room for a number
_SURE = 2.0  # standard errors; values of fewer are in brackets


def plot_layer_coupling(result: LayerCoupling, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot how strongly each pair of layers is coupled as shaded cells with their values, below the diagonal.

    Off the diagonal stands |H_ab|_F / (|H_aa|_F |H_bb|_F)^(1/2), on it, framed, |H_aa|_F over the largest of them. A
    value less than two standard errors from 0 is in brackets, and one that is not defined a dash. Cells that are too
    small for numbers go without.

    Args:
        result: from `layer_coupling`.
        ax: where to draw; a new figure by default, of a size for the table.
        colors: what to paint with.
    """
    L, colors = len(result.names), colors or Colors()
    side = min(2.0 + 0.5 * L, 12.0)
    ax = new_axes(ax, side, side)
    norms, stderr, shown = (t.double().cpu().numpy() for t in (result.norms, result.stderr, result.relative.clone()))
    np.fill_diagonal(shown, np.diagonal(norms) / (np.diagonal(norms).max() or 1.0))
    ax.set(xlim=(-0.5, L - 0.5), ylim=(L - 0.5, -0.5), aspect="equal")
    labels = layer_labels(ax, result.names)
    ax.set_yticks(range(L), labels)
    ax.set_xticks(range(L), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.text(
        0.0,
        1.02,
        "coupling |H$_{ab}$| / √(|H$_{aa}$| |H$_{bb}$|)\nframed: |H$_{aa}$| / largest",
        transform=ax.transAxes,
        ha="left",
        va="bottom",
        linespacing=1.5,
    )
    _draw_cells(ax, shown, colors)
    _write_values(ax, shown, norms < _SURE * stderr)
    return ax


def plot_layer_diagonals(result: LayerDiagonals, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot how the diagonal entries of each layer are spread: 5 to 95 %, the middle half, the median and the mean.

    The axis is asinh-scaled: linear around zero, as far as the smallest median, and logarithmic beyond.

    Args:
        result: from `layer_diagonals`.
        ax: where to draw; a new figure by default, of a height for the layers.
        colors: what to paint with.
    """
    rows, colors = result.rows, colors or Colors()
    ax = new_axes(ax, 1.2 + 0.3 * len(rows))
    places = np.arange(len(rows), dtype=float)
    q = np.array([row.quantiles for row in rows])
    mean = np.array([row.mean for row in rows])
    ax.hlines(places, q[:, 0], q[:, 4], color=colors.positive, linewidth=1.2, label="5 to 95 %")
    ax.hlines(places, q[:, 1], q[:, 3], color=colors.positive, linewidth=7, alpha=0.45, label="middle half")
    ax.plot(q[:, 2], places, "|", color=colors.positive, markersize=11, markeredgewidth=2, label="median")
    ax.plot(mean, places, "o", color=colors.outlier, markersize=5, label="mean")
    extreme = float(np.abs(np.concatenate([q.ravel(), mean])).max())
    medians = np.abs(q[:, 2])[np.abs(q[:, 2]) > 1e-6 * extreme]
    width = float(medians.min()) if len(medians) else (extreme or 1.0)
    ax.set_xscale("asinh", linear_width=width)
    asinh_ticks(ax.xaxis, min(0.0, float(q.min())), max(extreme, width), width)
    ax.axvline(0.0, color=colors.quiet, linewidth=0.8, zorder=0)
    ax.set_yticks(places, layer_labels(ax, [row.name for row in rows]))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", linewidth=0.5)
    noise = "," + (" " if figure_width(ax) > 5 else "\n") + "widened by their noise"
    ax.set(xlabel="diagonal entries of the Hessian" + ("" if result.exact else noise))
    legend_above(ax, columns=4)
    return ax


def _draw_cells(ax: Axes, shown: Array, colors: Colors) -> None:
    from matplotlib.patches import Rectangle

    for a, b in zip(*np.tril_indices(len(shown)), strict=True):
        framed = a == b
        strength = _STRONGEST * float(np.clip(np.nan_to_num(shown[a, b]), 0.02, 1.0))
        size = 0.9 if framed else 0.94
        corner = (b - size / 2, a - size / 2)
        ax.add_patch(Rectangle(corner, size, size, facecolor=colors.positive, alpha=strength, linewidth=0))
        if framed:
            ax.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=colors.quiet, linewidth=1.0))


def _write_values(ax: Axes, shown: Array, unsure: npt.NDArray[np.bool_]) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays the axes out, so that cells have a size
    cell = ax.get_window_extent().width / figure.dpi / len(shown)
    if cell < _ROOM:
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            label.set_fontsize(min(label.get_fontsize(), max(3.0, 60 * cell)))
        return
    for a, b in zip(*np.tril_indices(len(shown)), strict=True):
        text = _text(float(shown[a, b]))
        ax.text(float(b), float(a), f"({text})" if unsure[a, b] else text, ha="center", va="center")


def _text(value: float) -> str:
    if not math.isfinite(value):
        return MINUS if math.isnan(value) else "∞"
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"
