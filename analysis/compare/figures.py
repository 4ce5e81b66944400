"""The figure of a comparison: ratios to the first model, with both errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.compare.results import Compared, Comparison
from analysis.records.measured import Measured
from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_comparison"]

_MARKS = {"real": "o", "on these data": "D", "not told apart": "o", "unknown": "s"}


def plot_comparison(
    result: Comparison, *, model: int = 1, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot every number of a model over the same of the first, on a logarithmic axis, with its errors.

    Filled circles are real differences, diamonds hold on these data only, hollow circles are not told apart, squares
    have no known error. The thick bar is one standard error of the solver, the thin one with other data, too.

    Args:
        result: from `compare`.
        model: place of the model in `result.names`, 1 for the second.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    rows = [row for row in result.rows if math.isfinite(row.ratios[model]) and row.ratios[model] > 0]
    paint = {"real": colors.negative, "on these data": colors.positive}
    seen = set()
    for place, row in enumerate(rows):
        ratio, verdict = row.ratios[model], row.verdicts[model - 1]
        color = paint.get(verdict, colors.quiet)
        for data, width in ((True, 0.9), (False, 2.4)):
            error = _relative_error(row, model, data=data)
            if error > 0:
                ax.plot(ratio * np.exp([-error, error]), [place, place], color=color, linewidth=width, zorder=2)
        ax.plot(
            ratio,
            place,
            _MARKS[verdict],
            color=color,
            markerfacecolor="none" if verdict == "not told apart" else color,
            markersize=5,
            zorder=3,
            label=None if verdict in seen else verdict,
        )
        seen.add(verdict)
    ax.axvline(1.0, color=colors.quiet, linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    low, high = min(low, 1 / high), max(high, 1 / low)  # no change in the middle
    ax.set_xlim(min(low, 0.5), max(high, 2.0))
    decade_ticks(ax.xaxis)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", linewidth=0.5)
    ax.set(xlabel=f"{result.names[model]} over {result.names[0]}")
    if seen:
        legend_above(ax, columns=4)
    return ax


def _relative_error(row: Compared, model: int, *, data: bool) -> float:
    """Return the standard error of the logarithm of the ratio; 0 where it is not known."""
    errors = [_of(m, data=data) / abs(m.value) for m in (row.values[0], row.values[model])]
    error = math.hypot(*errors)
    return min(error, 2.3) if math.isfinite(error) else 0.0  # bars of more than a decade are cut


def _of(measured: Measured, *, data: bool) -> float:
    return math.hypot(measured.stderr, measured.data_stderr) if data else measured.stderr
