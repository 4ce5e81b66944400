"""Figures of pruning: predicted against true changes, the loss against sparsity, layers, tickets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.generalization.pruning.results import ALL
from analysis.show.drawing import Colors, decade_ticks, figure_width, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.pruning.results import PruningRecord, Tickets

__all__ = ["plot_layer_pruning", "plot_pruning", "plot_pruning_predictions", "plot_tickets"]

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _styles(names: Sequence[str], colors: Colors) -> dict[str, dict[str, Any]]:
    """Return colour, marker and kind of line for each name, the same wherever it is drawn."""
    paints = (colors.positive, colors.negative, colors.outlier, "#CC79A7", "#E69F00")
    found = {}
    for i, name in enumerate(names):
        line = "solid" if i < len(paints) else (0, (4, 2))
        found[name] = {"color": paints[i % len(paints)], "marker": _MARKS[i % len(_MARKS)], "linestyle": line}
    return found


def _legend(ax: Axes, names: Sequence[str], columns: int) -> None:
    """Put a legend above, in as many columns as such names leave room for."""
    wide = max((len(name) for name in names), default=0)
    legend_above(ax, columns=max(1, min(columns, 95 // (wide + 5))))


def plot_pruning_predictions(
    record: PruningRecord, *, most: float = 1.0, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the true change of the loss against the predicted one, for single layers and sparsities up to `most`.

    On the line the quadratic model is exact. Changes that are not positive have no place on the axes.

    Args:
        record: from `measure_pruning`.
        most: largest sparsity.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    ends = [math.inf, 0.0]
    for method, style in _styles(record.methods, colors).items():
        points = [p for p in record.of(method) if p.sparsity <= most + 1e-9]
        points = [p for p in points if p.predicted > 0 and 0 < p.true < math.inf]
        x, y = [p.predicted for p in points], [p.true for p in points]
        ends = [min([ends[0], *x]), max([ends[1], *x])]
        ax.plot(x, y, **{**style, "linestyle": "none"}, markersize=4, alpha=0.8, label=method)
    ax.set(xscale="log", yscale="log", xlabel="predicted, g'd + ½ d'H d", ylabel="true change of the loss")
    if ends[1] > 0:
        ax.plot(ends, ends, color=colors.quiet, linewidth=0.9, zorder=0)
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    _legend(ax, record.methods, 6)
    return ax


def plot_pruning(
    record: PruningRecord, *, layer: str = ALL, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the true rise of the loss against sparsity for each method, with bars of one standard error over the data.

    Rises on held-out data, where there are any, are dotted.

    Args:
        record: from `measure_pruning`.
        layer: a tensor's name, or "all": one ranking of all tensors.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    for method, style in _styles(record.methods, colors).items():
        points = record.of(method, layer)
        x = [100 * p.sparsity for p in points]
        y = [_shown(p.true) for p in points]
        error = [0.0 if math.isnan(p.true_stderr) else min(p.true_stderr, 0.9 * abs(p.true)) for p in points]
        bars: dict[str, Any] = {"capsize": 2, "linewidth": 1.3, "elinewidth": 0.9}
        ax.errorbar(x, y, error, markersize=4, label=method, **style, **bars)
        held_out = [_shown(p.held_out) for p in points]
        ax.plot(x, held_out, color=style["color"], linewidth=0.9, linestyle=(0, (1, 2)))
    if any(p.held_out == p.held_out for p in record.points):
        ax.plot([], [], color=colors.quiet, linewidth=0.9, linestyle=(0, (1, 2)), label="held out")
    ax.set(yscale="log", xlabel="weights removed, %", ylabel="rise of the loss")
    decade_ticks(ax.yaxis)
    _legend(ax, record.methods, 4)
    return ax


def plot_layer_pruning(
    record: PruningRecord, method: str, *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the true rise of the loss against sparsity, each tensor pruned alone by one method.

    Of more than eight tensors, those that cost the most where most is removed.

    Args:
        record: from `measure_pruning`.
        method: one of its methods.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    cost = {name: max(record.of(method, name), key=lambda p: p.sparsity).true for name in record.layers}
    most = sorted(cost, key=lambda name: cost[name])[-len(_MARKS) :]
    shown = [name for name in record.layers if name in most]
    for name, style in _styles(shown, colors).items():
        points = record.of(method, name)
        y = [_shown(p.true) for p in points]
        ax.plot([100 * p.sparsity for p in points], y, **style, markersize=4, label=name, linewidth=1.3)
    ax.set(yscale="log", xlabel="weights of the tensor removed, %", ylabel="rise of the loss")
    decade_ticks(ax.yaxis)
    _legend(ax, shown, 4 if figure_width(ax) > 5 else 1)
    return ax


def plot_tickets(tickets: Tickets, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the difference to the dense network of the same seed, its mean and 95 % interval, against sparsity.

    Args:
        tickets: from `lottery_tickets`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    kinds = list(dict.fromkeys(row.kind for row in tickets.rows[1:]))
    for i, (kind, style) in enumerate(_styles(kinds, colors).items()):
        rows = [row for row in tickets.rows if row.kind == kind]
        means = [tickets.difference(kind, row.sparsity) for row in rows]
        x = np.array([100 * row.sparsity for row in rows]) + 0.6 * (i - (len(kinds) - 1) / 2)
        low, high = np.array([m.interval() if len(rows[0].values) > 1 else (m.value, m.value) for m in means]).T
        y = np.array([m.value for m in means])
        ax.errorbar(x, y, [y - low, high - y], **style, markersize=5, label=kind, capsize=3, linewidth=1.2)
    ax.axhline(0, color=colors.quiet, linewidth=0.9, zorder=0)
    ax.set(xlabel="weights removed, %", ylabel=f"{tickets.metric} less that of the dense network")
    legend_above(ax, columns=3)
    return ax


def _shown(value: float) -> float:
    """Return a value as a logarithmic axis can have it."""
    return value if 0 < value < math.inf else math.nan
