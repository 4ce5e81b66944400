"""Figures of gradient noise; made as those of `analysis.inspection.figures` are, from results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, legend_above, new_axes, to_numpy
from analysis.show.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.noise.results import GradientNoise

__all__ = ["plot_batch_sizes", "plot_layer_noise"]


def plot_batch_sizes(result: GradientNoise, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the share of the full gradient's progress that a step makes against batch size, with the noise scale.

    Args:
        result: from `analysis.noise.measure.gradient_noise`.
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
        result: from `analysis.noise.measure.gradient_noise`.
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
