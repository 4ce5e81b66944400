"""The figure of a training run: its loss, its penalties and its noise scale, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.training.results import TrainingRecord

__all__ = ["plot_training"]


def plot_training(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot loss, both penalties and the noise scale over a run; the noise scale on an axis of its own at the right.

    Args:
        result: from `analysis.training.measure.TrainingMonitor.record`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    steps = np.asarray(result.steps, dtype=float)
    marker = "o" if len(steps) == 1 else ""  # a line of one point cannot be seen
    lines = (
        ("loss", "loss", colors.positive, "-"),
        ("full_penalty", "penalty of the full gradient", colors.negative, "--"),
        ("batch_penalty", "penalty of the noise", colors.negative, "-."),
    )
    for field, label, color, style in lines:
        values = to_numpy(result.series(field))
        ax.plot(
            steps,
            np.where(values > 0, values, np.nan),
            color=color,
            linestyle=style,
            marker=marker,
            linewidth=1.6,
            label=label,
        )
    scales, low, high = (
        to_numpy(result.series(name)) for name in ("noise_scale", "noise_scale_lower", "noise_scale_upper")
    )
    shown = np.where((scales > 0) & np.isfinite(scales), scales, np.nan)
    right = ax.twinx()
    top = 3 * np.nanmax(shown, initial=1.0)
    right.fill_between(
        steps, np.maximum(low, 0.1), np.minimum(high, top), color=colors.quiet, alpha=0.25, linewidth=0, step=None
    )
    right.plot(steps, shown, linestyle=":", marker=marker, color=colors.outlier, linewidth=1.8)
    ax.plot([], [], ":", color=colors.outlier, linewidth=1.8, label="noise scale (right)")
    right.axhline(result.batch_size, color=colors.quiet, linewidth=0.9)
    right.annotate(
        f"batch size {result.batch_size}",
        (0.99, result.batch_size),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        horizontalalignment="right",
    )
    for axis in (ax, right):
        axis.set_yscale("log")
        decade_ticks(axis.yaxis)
    right.set_ylim(min(0.5 * result.batch_size, 0.7 * np.nanmin(shown, initial=top)), max(top, 2 * result.batch_size))
    right.set_ylabel("examples")
    ax.set(xlabel="step", ylabel="loss")
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    legend_above(ax, columns=2)
    return ax
