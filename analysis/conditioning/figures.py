"""Figures of conditioning: condition numbers of layers and under preconditioners, and the effective dimension."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy
from analysis.show.wording import between

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.conditioning.results import Conditioning

__all__ = ["plot_conditioning", "plot_effective_dimension"]


def plot_conditioning(result: Conditioning, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot condition numbers over the numerical range: of the whole, under each preconditioner, of each layer.

    Args:
        result: from `conditioning`.
        ax: where to draw; a new figure by default, of a height for the rows.
        colors: what to paint with.
    """
    colors = colors or Colors()
    groups = [
        ("whole", "D", colors.positive, (result.whole,)),
        ("preconditioned", "o", colors.outlier, result.preconditioned),
        ("layer", "s", colors.negative, result.layers),
    ]
    num_rows = sum(len(rows) for *_, rows in groups)
    ax = new_axes(ax, 1.2 + 0.3 * num_rows)
    place, names = 0, []
    for label, shape, color, rows in groups:
        for i, row in enumerate(rows):
            value = row.condition.value
            if math.isfinite(value):
                if math.isfinite(row.condition.lower):
                    ax.plot([row.condition.lower, row.condition.upper], [place, place], color=color, linewidth=1.4)
                ax.plot(value, place, shape, color=color, markersize=5, label=None if i else label)
            ax.text(1.02, place, between(row.condition), transform=ax.get_yaxis_transform(), va="center")
            names.append("loss" if label == "whole" else row.name)
            place += 1
    ax.axvline(1 / result.floor, color=colors.quiet, linewidth=0.9, linestyle=(0, (3, 2)), label="limit of the range")
    ax.set_xscale("log")
    ax.set_xlim(0.8, 2 / result.floor)
    decade_ticks(ax.xaxis)
    ax.set_yticks(range(num_rows), names)
    ax.set_ylim(num_rows - 0.4, -0.6)
    ax.grid(axis="y", linewidth=0.5)
    ax.set(xlabel="condition number over the numerical range")
    legend_above(ax, columns=4)
    return ax


def plot_effective_dimension(result: Conditioning, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot how many directions are determined beyond a damping, with a band of one standard error.

    Args:
        result: from `conditioning`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    z, d, stderr = (
        to_numpy(t) for t in (result.damping, result.effective_dimension, result.effective_dimension_stderr)
    )
    if (stderr > 0).any():
        ax.fill_between(
            z,
            np.maximum(d - stderr, 0),
            d + stderr,
            color=colors.quiet,
            alpha=0.5,
            linewidth=0,
            label="± 1 standard error",
        )
    ax.plot(z, d, color=colors.positive, linewidth=1.6, label="effective dimension")
    ax.axhline(result.whole.num_params, color=colors.quiet, linewidth=0.8, label="number of parameters")
    ax.set_xscale("log")
    ax.set_xlim(z[0], z[-1])
    ax.set_ylim(0, 1.08 * result.whole.num_params)
    decade_ticks(ax.xaxis)
    ax.set(xlabel="damping z", ylabel="∑ λ / (λ + z)")
    legend_above(ax, columns=3)
    return ax
