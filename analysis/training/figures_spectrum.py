"""Further figures of a training run: its spectrum as a waterfall, smoothness along the gradient, depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import (
    Array,
    Colors,
    asinh_ticks,
    decade_ticks,
    figure_width,
    legend_above,
    new_axes,
    to_numpy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.training.results import TrainingRecord

__all__ = ["plot_depth", "plot_smoothness", "plot_waterfall"]

_BINS, _LINEAR = 160, 1e-3  # rows of the waterfall; share of the largest eigenvalue up to which its axis is linear
_FEWEST = 0.1  # eigenvalues a row holds at least where it is painted


def plot_waterfall(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot how many eigenvalues of the Hessian lie where, reading by reading; a line is the threshold of a rate.

    Args:
        result: with the quantity "spectrum".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    readings = [r for r in result.readings if r.ritz_values]
    low = min((min(r.ritz_values) for r in readings), default=-1.0)
    high = max((max(r.ritz_values) for r in readings), default=1.0)
    width = _LINEAR * max(abs(low), abs(high), 1e-30)
    edges = np.linspace(np.arcsinh(1.1 * low / width), np.arcsinh(1.1 * high / width), _BINS + 1)
    steps = np.asarray([r.step for r in readings], dtype=float)
    if len(readings):
        counts = np.stack([_counted(r.ritz_values, r.ritz_weights, width, edges) for r in readings], axis=1)
        counts *= result.num_params or 1
        between = (steps[1:] + steps[:-1]) / 2
        last = steps[-1] + max(1.0, (steps[-1] - steps[0]) / max(len(steps) - 1, 1)) / 2
        sides = np.concatenate([[steps[0]], between, [last]])
        shown = np.ma.masked_less(counts, _FEWEST)
        mesh = ax.pcolormesh(sides, edges, np.ma.log10(shown), cmap="viridis", rasterized=True, shading="flat")
        if figure_width(ax) > 5 and ax.figure is not None:
            ax.figure.colorbar(mesh, ax=ax, label="log₁₀ eigenvalues", pad=0.01)
    threshold = to_numpy(result.series("threshold"))
    plain, own = (to_numpy(result.series(name)) for name in ("sharpness", "preconditioned"))
    if np.isnan(own).all() or np.array_equal(own, plain, equal_nan=True):
        inside = np.where((threshold > 0) & (threshold < 1.1 * high), threshold, np.nan)
        if np.isfinite(inside).any():
            at = np.asarray(result.steps, dtype=float)
            ax.plot(at, np.arcsinh(inside / width), color=colors.negative, linewidth=1.4, label="threshold of the rate")
            legend_above(ax, columns=2)
    scale = _Asinh(width)
    ax.set_ylim(edges[0], edges[-1])
    scale.ticks(ax, low, high)
    ax.set(xlabel="step", ylabel="eigenvalue")
    return ax


class _Asinh:
    """Ticks of an axis whose coordinate is asinh(value / width)."""

    def __init__(self, width: float) -> None:
        self.width = width

    def ticks(self, ax: Axes, low: float, high: float) -> None:
        asinh_ticks(ax.yaxis, low, high, self.width)
        labels = [label.get_text() for label in ax.yaxis.get_ticklabels()]
        ax.yaxis.set_ticks(np.arcsinh(np.asarray(ax.yaxis.get_ticklocs()) / self.width).tolist(), labels)


def _counted(values: tuple[float, ...], weights: tuple[float, ...], width: float, edges: Array) -> Array:
    """Return the weight in each row, smoothed over its neighbours."""
    found, _ = np.histogram(np.arcsinh(np.asarray(values) / width), bins=edges, weights=np.asarray(weights))
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.2) ** 2)
    smooth: Array = np.convolve(found, kernel / kernel.sum(), mode="same")
    return smooth


def plot_smoothness(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot loss range, change of the gradient and effective smoothness along the gradient against steps.

    Args:
        result: with the quantity "smoothness".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    steps = np.asarray(result.steps, dtype=float)
    span = to_numpy(result.series("path_loss_high") - result.series("path_loss_low"))
    for values, label, color, style in (
        (to_numpy(result.series("effective_smoothness")), "smoothness", colors.positive, "-"),
        (to_numpy(result.series("gradient_change_high")), "gradient change", colors.negative, "--"),
        (span, "loss range", colors.outlier, "-."),
    ):
        ax.plot(steps, np.where(values > 0, values, np.nan), linestyle=style, color=color, linewidth=1.6, label=label)
    ax.set_yscale("log")
    decade_ticks(ax.yaxis)
    ax.set(xlabel="step", ylabel="along the gradient")
    legend_above(ax, columns=3)
    return ax


def plot_depth(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the norms of Jacobians and gradients against the layers, at the first reading and the last.

    Args:
        result: with the quantity "depth".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    readings = [r for r in result.readings if r.layer_gradients]
    names: list[str] = []
    for reading, style, when in ((readings[:1], "--", "start"), (readings[-1:], "-", "end")):
        for r in reading:
            names = list(r.layer_gradients)
            for values, color, marker, label in (
                (r.layer_jacobians, colors.positive, "o", "Jacobian"),
                (r.layer_gradients, colors.negative, "s", "gradient"),
            ):
                shown = [values.get(name, np.nan) or np.nan for name in names]
                face = color if when == "end" else "none"
                ax.plot(shown, style, marker=marker, ms=5, mfc=face, color=color, lw=1.4, label=f"{label}, {when}")
    ax.set_yscale("log")
    decade_ticks(ax.yaxis)
    every = max(1, -(-len(names) // (12 if figure_width(ax) > 5 else 5)))
    ax.set_xticks(range(0, len(names), every), names[::every], rotation=30, ha="right", fontsize="small")
    ax.set(ylabel="norm")
    legend_above(ax, columns=4)
    return ax
