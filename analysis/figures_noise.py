"""Figures of gradient noise; made as those of `analysis.figures` are, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy
from analysis.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.noise_results import GradientNoise
    from analysis.training_record import TrainingRecord

__all__ = ["plot_batch_sizes", "plot_layer_noise", "plot_training"]


def plot_batch_sizes(result: GradientNoise, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the share of the full gradient's progress that a step makes against batch size, with the noise scale.

    Args:
        result: from `analysis.gradient_noise.gradient_noise`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    scale, N = result.noise_scale, result.effective_examples
    end = 100 * max(1.0, N, scale.value if np.isfinite(scale.value) else 1.0)
    sizes = np.geomspace(1, end, 200)
    low, high = max(scale.lower, 0.0), scale.upper

    def share(noise: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return 1 / (1 + noise / sizes) if np.isfinite(noise) else np.zeros_like(sizes)

    ax.fill_between(
        sizes,
        share(high),
        share(low),
        color=colors.quiet,
        alpha=0.4,
        linewidth=0,
        label=f"{100 * scale.confidence:.0f} % interval",
    )
    if result.squared_norm.value > 0:
        ax.plot(sizes, share(scale.value), color=colors.positive, linewidth=1.6)
        ax.plot(scale.value, 0.5, "o", color=colors.outlier, markersize=5)
        ax.annotate(
            f"noise scale {count(round(scale.value))}",
            (scale.value, 0.5),
            xytext=(8, -12),
            textcoords="offset points",
        )
    ax.axvline(N, color=colors.quiet, linewidth=0.9, linestyle=(0, (3, 2)), label="examples at hand")
    ax.set_xscale("log")
    ax.set_xlim(1, end)
    ax.set_ylim(0, 1.02)
    decade_ticks(ax.xaxis)
    ax.set(xlabel="batch size, in examples", ylabel="progress of a step")
    legend_above(ax, columns=2)
    return ax


def plot_layer_noise(result: GradientNoise, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot tr S and |G|^2 of each layer, one above the other, on a logarithmic axis.

    Args:
        result: from `analysis.gradient_noise.gradient_noise`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    rows = np.arange(len(result.layers))
    traces, squares = to_numpy(result.layer_traces), to_numpy(result.layer_squared_norms)
    for values, marker, color, label in (
        (traces, "s", colors.negative, "noise of one example, tr S"),
        (squares, "o", colors.positive, "signal, |G|²"),
    ):
        ax.plot(np.where(values > 0, values, np.nan), rows, marker, color=color, markersize=5, label=label)
    for row, (a, b) in enumerate(zip(traces, squares, strict=True)):
        if a > 0 and b > 0:
            ax.plot([b, a], [row, row], color=colors.quiet, linewidth=0.9, zorder=0)
    ax.set_yticks(rows, list(result.layers))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if (traces > 0).any() or (squares > 0).any():
        ax.set_xscale("log")
        decade_ticks(ax.xaxis)
    ax.set(xlabel="(loss / parameter)²")
    legend_above(ax, columns=2)
    return ax


def plot_training(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot loss, both penalties and the noise scale over a run; the noise scale on an axis of its own at the right.

    Args:
        result: from `analysis.along_training.TrainingMonitor.record`.
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
