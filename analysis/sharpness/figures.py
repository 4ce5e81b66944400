"""Figures of sharpness: the measures of one point, or how they changed from another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, figure_width, legend_above, new_axes
from analysis.show.wording import MINUS, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.sharpness.results import SharpnessTable

__all__ = ["plot_sharpness"]


def plot_sharpness(
    table: SharpnessTable,
    *,
    reference: SharpnessTable | None = None,
    ax: Axes | None = None,
    colors: Colors | None = None,
) -> Axes:
    """Plot every measure on a logarithmic axis, or, with a reference, its ratio to the same measure there.

    Circles stay as they are when a ReLU network is rescaled by layers, squares do not. Lower bounds carry an arrow,
    others a bar of one standard error where it is wider than the mark. Values have units of their own and are written
    beside, where the figure is wide enough; what is not positive has no place on the axis.

    Args:
        table: from `sharpness`.
        reference: from the same measures at another point.
        ax: where to draw; a new figure by default, of a height for the rows.
        colors: what to paint with.
    """
    colors, rows = colors or Colors(), table.rows
    ax = new_axes(ax, 1.2 + 0.27 * len(rows))
    ratios = None if reference is None else table.ratios(reference)
    seen = set()
    for place, row in enumerate(rows):
        value = row.value if ratios is None else ratios[row.name]
        stderr = row.stderr * (value / row.value) if row.value else math.nan
        text = number(value, 3).replace("undefined", MINUS) + ("" if ratios is not None else f"  {_unit(row.unit)}")
        if figure_width(ax) > 5:
            ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center")
        if not (value > 0 and math.isfinite(value)):
            continue
        color = colors.outlier if row.rescaling_invariant else colors.negative
        label = "invariant" if row.rescaling_invariant else "not invariant"
        if stderr > 0:
            low = max(value - stderr, value / 100)
            ax.plot([low, value + stderr], [place, place], color=color, linewidth=1.4)
        if row.kind == "lower bound" and ratios is None:
            ax.annotate(
                "",
                (1.0, place),
                xytext=(value, place),
                xycoords=("axes fraction", "data"),
                textcoords="data",
                arrowprops={"arrowstyle": "-", "color": colors.quiet, "linewidth": 0.8, "linestyle": (0, (2, 2))},
            )
        shape = "o" if row.rescaling_invariant else "s"
        ax.plot(value, place, shape, color=color, markersize=5, label=None if label in seen else label)
        seen.add(label)
    if ratios is not None:
        ax.axvline(1.0, color=colors.quiet, linewidth=0.8, zorder=0)
    else:
        ax.plot([], [], color=colors.quiet, linewidth=0.8, linestyle=(0, (2, 2)), label="at least")
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high / low < 100:  # room for two decades at least
        middle = float(np.sqrt(low * high))
        ax.set_xlim(middle / 10, middle * 10)
    decade_ticks(ax.xaxis)
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", linewidth=0.5)
    ax.set(xlabel="value, each in its own unit" if ratios is None else "ratio to the reference")
    legend_above(ax, columns=3)
    return ax


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit.replace("^2", "²").replace("percent", "%")
