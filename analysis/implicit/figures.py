"""Figures of implicit regularization; made as those of `analysis.inspection.figures` are, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, figure_width, legend_above, new_axes, to_numpy
from analysis.show.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.implicit.results import BackwardError, ImplicitRegularization

__all__ = ["plot_backward_error", "plot_penalties", "plot_penalty_by_batch_size"]


def plot_backward_error(result: BackwardError, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the distances from the three flows against the learning rate, with lines of slope 2 and 3.

    Args:
        result: from `analysis.implicit.backward_error.backward_error`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    lrs = to_numpy(result.lrs)
    series = [
        ("to_loss", "flow of C", colors.quiet, "s"),
        ("to_full", "with |∇C|²", colors.negative, "^"),
        ("to_modified", "with the noise of batches, too", colors.positive, "o"),
    ]
    for field, label, color, marker in series if result.num_batches > 1 else [series[0], series[2]]:
        name = label if result.num_batches > 1 or field == "to_loss" else "with |∇C|²"
        values = to_numpy(getattr(result, field))
        usable = np.where((values > 0) & np.isfinite(values), values, np.nan)
        ax.plot(lrs, usable, marker=marker, color=color, markersize=5, linewidth=1.4, label=name)
        if field != "to_full" and result.num_epochs == 1 and np.isfinite(usable[0]):
            order = 2 if field == "to_loss" else 3
            guide = usable[0] * (lrs / lrs[0]) ** order
            ax.plot(lrs, guide, color=color, linewidth=0.8, linestyle=(0, (2, 3)))
            below = (8, -12) if order == 3 else (0, 8)
            ax.annotate(f"slope {order}", (lrs[0], usable[0]), xytext=below, textcoords="offset points")
    if result.fails_from is not None:
        ax.axvline(result.fails_from, color=colors.quiet, linewidth=0.9)
        ax.annotate(
            "no nearer from here",
            (result.fails_from, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            horizontalalignment="right",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    reach = to_numpy(result.to_loss)
    shortest = to_numpy(result.to_modified)
    if (shortest > 0).any():  # flows that leave the range of sense would press all others together
        top = np.max(reach[np.isfinite(reach)], initial=shortest[shortest > 0].min())
        ax.set_ylim(0.2 * shortest[shortest > 0].min(), 10 * top)
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    if len(lrs) <= 6:  # few enough to be named, and often within one decade
        ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        ax.minorticks_off()
    ax.set(xlabel="learning rate", ylabel="distance after an epoch, in parameters")
    legend_above(ax, columns=3)
    return ax


def plot_penalties(result: ImplicitRegularization, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the layers' parts of both penalties, in units of the loss, as bars.

    Args:
        result: from `analysis.implicit.measure.implicit_regularization`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    from matplotlib.ticker import MaxNLocator

    ax, colors = new_axes(ax), colors or Colors()
    rows = np.arange(len(result.layers))
    full, noise = to_numpy(result.layer_full_penalties), to_numpy(result.layer_batch_penalties)
    ax.barh(rows - 0.2, full, 0.36, color=colors.negative, label="of the full gradient")
    ax.barh(
        rows + 0.2, noise, 0.36, color=colors.positive, hatch="//", edgecolor="white", linewidth=0, label="of the noise"
    )
    ax.set_yticks(rows, list(result.layers))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4 if figure_width(ax) > 5 else 2))
    ax.xaxis.set_major_formatter(lambda x, _: number(x, 2))
    ax.set(xlabel="penalty, in units of the loss")
    legend_above(ax, columns=2)
    return ax


def plot_penalty_by_batch_size(
    result: ImplicitRegularization, *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot loss and both penalties against the size of whole batches, all known from one pass.

    Args:
        result: from `implicit_regularization` with a `batch_size`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    if not np.isfinite(result.num_examples):
        ax.text(0.5, 0.5, "measured without batch_size=", transform=ax.transAxes, horizontalalignment="center")
        return ax
    sizes = np.unique(np.geomspace(1, max(1.0, result.num_examples), 60).round().astype(int))
    noise = np.array([result.batch_penalty_at(int(size), drop_last=True) for size in sizes])
    ax.axhline(result.loss, color=colors.quiet, linewidth=1.2, label="loss")
    ax.axhline(result.full_penalty, color=colors.negative, linewidth=1.4, linestyle="--", label="of the full gradient")
    ax.plot(sizes, np.where(noise > 0, noise, np.nan), color=colors.positive, linewidth=1.6, label="of the noise")
    if result.batch_penalty > 0:
        ax.plot(result.batch_size, result.batch_penalty, "o", color=colors.outlier, markersize=5)
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    if max(result.loss, result.full_penalty, *noise) > 0:  # else there is nothing a logarithm could show
        ax.set_yscale("log")
        decade_ticks(ax.yaxis)
    ax.set(xlabel="batch size, in examples", ylabel="penalty, in units of the loss")
    legend_above(ax, columns=3)
    return ax
