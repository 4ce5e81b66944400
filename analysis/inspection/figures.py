"""Figures of the spectrum: each takes results only, draws into given axes or a new figure, and returns the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from analysis.inspection.results import DataErrors, Inspection, LayerCurvature
from analysis.show.drawing import (
    Array,
    Colors,
    asinh_ticks,
    decade_ticks,
    ink,
    layer_labels,
    legend_above,
    new_axes,
    to_numpy,
)
from analysis.show.wording import MINUS, count
from curvature.errors import InputError
from curvature.results.estimates import EigenPairs, SpectralDensity
from curvature.results.jackknife import jackknife_stderr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvature.spectra.results import Spectrum

__all__ = ["plot_eigenvalues", "plot_layers", "plot_spectral_density"]

# -- spectral density -------------------------------------------------------------------------------------------------


def plot_spectral_density(
    density: SpectralDensity | Spectrum | Inspection,
    *,
    top: EigenPairs | None = None,
    bottom: EigenPairs | None = None,
    data: DataErrors | None = None,
    ax: Axes | None = None,
    colors: Colors | None = None,
    scale: Literal["auto", "linear", "asinh"] = "auto",
) -> Axes:
    """Plot how many eigenvalues lie where: a smoothed count on a logarithmic axis, with a band of one standard error.

    The height is n sum_k w_k exp(-(u - u_k)^2 / 2 h^2) over quadrature nodes u_k on the axis as drawn: the density in
    units in which one eigenvalue on its own is a bump of height 1. On a linear axis it is `density.density` times
    n h sqrt(2 pi), with h = `density.sigma`. Where eigenvalues span decades the axis is asinh-scaled: linear around
    zero, as far as the quadrature resolves it, and logarithmic beyond.

    Args:
        density: from `spectral_density`; or all of `spectrum` or of `inspect`, with the pairs.
        top: converged pairs, marked as outliers above the curve.
        bottom: converged pairs at the lower end, marked likewise.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
        data: errors over the data, drawn as a dashed band.
        scale: of the eigenvalue axis; "auto" takes asinh where the largest eigenvalue is beyond 30 times the bulk.
    """
    ax = new_axes(ax)
    colors = colors or Colors()
    if isinstance(density, Inspection):
        data = data or density.data
    if not isinstance(density, SpectralDensity):
        top, bottom, density = top or density.top, bottom or density.bottom, density.density
    nodes, weights = to_numpy(density.nodes), to_numpy(density.weights)
    width = _linear_width(nodes, weights) if scale != "linear" else math.inf
    extreme = float(np.abs(nodes[weights > 0]).max(initial=0.0))
    curved = scale == "asinh" or (scale == "auto" and extreme > 30 * width)
    to_axis, h = ((lambda t: np.arcsinh(t / width)), None) if curved else ((lambda t: t), density.sigma)
    u, mean, stderr, h = _smoothed_count(to_axis(nodes), density.dimension * weights, h)
    x = width * np.sinh(u) if curved else u
    _draw_count(ax, x, mean, stderr, colors)
    if data is not None:
        without = [
            _count_on(u, to_axis(nodes), density.dimension * weights, h)
            for nodes, weights in zip(to_numpy(data.nodes), to_numpy(data.weights), strict=True)
        ]
        moved = jackknife_stderr(torch.tensor(mean), torch.tensor(np.stack(without)), data.shares.double()).numpy()
        for edge, label in ((mean - moved, "± other data"), (mean + moved, None)):
            ax.plot(x, np.maximum(edge, 1e-3), color=colors.quiet, linewidth=0.9, linestyle=(0, (3, 2)), label=label)
    if curved:
        ax.set_xscale("asinh", linear_width=width)
        asinh_ticks(ax.xaxis, x[0], x[-1], width)
    ax.set_yscale("log")
    ax.set_ylim(0.3, 3 * max(1.0, float(mean.max())))
    ax.set_xlim(x[0], x[-1])
    for pairs, name in ((top, "largest"), (bottom, "smallest")):
        if pairs is not None:
            _mark_eigenvalues(ax, pairs, colors, name)
    decade_ticks(ax.yaxis)
    ax.axvline(0.0, color=colors.quiet, linewidth=0.8, zorder=0)
    ax.set(xlabel="eigenvalue λ", ylabel="eigenvalues (smoothed count)")
    legend_above(ax, columns=3)
    return ax


def _linear_width(nodes: Array, weights: Array) -> float:
    """Return how finely the quadrature resolves the spectrum around zero: the median gap of the innermost nodes."""
    gaps = []
    for row, weight in zip(nodes, weights, strict=True):
        inside = np.sort(row[weight > 0])
        order = np.argsort(np.abs(inside))[: max(3, len(inside) // 4)]
        gaps.append(np.diff(np.sort(inside[order])))
    every = np.concatenate(gaps)
    gap = float(np.median(every)) if every.size else 0.0  # no gap where there is one node only
    return max(gap, 1e-6 * float(np.abs(nodes).max(initial=0.0)), 1e-30)


def _smoothed_count(nodes: Array, counts: Array, h: float | None) -> tuple[Array, Array, Array, float]:
    """Return a grid on the axis, the smoothed count and its standard error over probes, and the kernel's width."""
    used = nodes[counts > 0]
    low, high = float(used.min()), float(used.max())
    if h is None or h <= 0:
        h = (high - low) / 50 or 1.0
    grid = np.linspace(low - 4 * h, high + 4 * h, 800)
    samples = np.stack([_count_on(grid, x, c, h) for x, c in zip(nodes, counts, strict=True)], axis=1)
    spread = samples.std(axis=1, ddof=1) / math.sqrt(len(nodes)) if len(nodes) > 1 else np.zeros(len(grid))
    return grid, samples.mean(axis=1), spread, h


def _count_on(grid: Array, nodes: Array, counts: Array, h: float) -> Array:
    kernel = np.exp(-0.5 * ((grid[:, None] - nodes) / h) ** 2)  # (points, nodes)
    smoothed: Array = (kernel * counts).sum(axis=1)
    return smoothed


def _draw_count(ax: Axes, x: Array, mean: Array, stderr: Array, colors: Colors) -> None:
    curve = np.maximum(mean, 1e-3)
    for side, color, label, hatch in (
        (x >= 0, colors.positive, "positive", None),
        (x <= 0, colors.negative, "negative", "////"),
    ):
        if not (side & (mean > 0.3)).any():
            continue
        where = side.tolist()
        ax.fill_between(x, 1e-3, curve, where=where, color=color, alpha=0.25, linewidth=0, label=label)
        if hatch is not None:  # told apart in grey, too
            ax.fill_between(x, 1e-3, curve, where=where, facecolor="none", edgecolor=color, hatch=hatch, linewidth=0)
        ax.plot(x, np.where(side, mean, np.nan), color=color, linewidth=1.6)
    if (stderr > 0).any():
        low, high = np.maximum(mean - stderr, 1e-3), np.maximum(mean + stderr, 1e-3)
        ax.fill_between(
            x, low, high, color=colors.quiet, alpha=0.5, linewidth=0, label="± 1 standard error", zorder=1.5
        )


def _mark_eigenvalues(ax: Axes, pairs: EigenPairs, colors: Colors, name: str) -> None:
    """Mark converged pairs at height 1, the height of a lone eigenvalue; hollow where the tolerance was not reached."""
    values, converged = to_numpy(pairs.eigenvalues), pairs.converged.cpu().numpy()
    marker = "v" if name == "largest" else "^"
    for chosen, face, suffix in ((converged, colors.outlier, ""), (~converged, "none", ", not converged")):
        if not chosen.any():
            continue
        label = f"{chosen.sum()} {name}{suffix}"
        line = ax.plot(values[chosen], np.ones(chosen.sum()), marker, markersize=5, linestyle="none", label=label)
        line[0].set(markerfacecolor=face, markeredgecolor=colors.outlier)


# -- eigenvalues ------------------------------------------------------------------------------------------------------


def plot_eigenvalues(
    top: EigenPairs,
    bottom: EigenPairs | None = None,
    *,
    num_params: int | None = None,
    data: DataErrors | None = None,
    ax: Axes | None = None,
    colors: Colors | None = None,
) -> Axes:
    """Plot the extreme eigenvalues by rank, each with a bar of one residual: an eigenvalue lies within it.

    Behind them stands, broad and pale, one standard error over data of the same size, where it is known.

    Args:
        top: the largest, descending.
        bottom: the smallest, descending.
        num_params: size of the matrix, which gives the ranks of the smallest; needed for these only.
        data: errors over the data.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax = new_axes(ax)
    colors = colors or Colors()
    k = len(top.eigenvalues)
    if bottom is not None and num_params is None:
        raise InputError("num_params is needed to number the smallest eigenvalues: pass the size of the matrix.")
    found = 0 if bottom is None else len(bottom.eigenvalues)
    num_params = k if num_params is None else num_params
    low = min(found, num_params - k)  # in tiny matrices the two ends overlap
    gap = 1 if k + low < num_params else 0
    places = np.concatenate([np.arange(k), k + gap + np.arange(low)])
    ends = [(top, slice(0, k)), *([] if bottom is None else [(bottom, slice(found - low, None))])]
    values = np.concatenate([to_numpy(pairs.eigenvalues)[part] for pairs, part in ends])
    residuals = np.concatenate([to_numpy(pairs.residual_norms)[part] for pairs, part in ends])
    converged = np.concatenate([pairs.converged.cpu().numpy()[part] for pairs, part in ends])
    if data is not None:
        moved = np.concatenate([to_numpy(data.top)[:k], to_numpy(data.bottom)[found - low :]])
        ax.errorbar(
            places,
            values,
            moved,
            fmt="none",
            ecolor=colors.quiet,
            elinewidth=7,
            alpha=0.35,
            zorder=1,
            label="± other data (one standard error)",
        )
        legend_above(ax, columns=1)
    for place, value, residual, sure in zip(places, values, residuals, converged, strict=True):
        color, marker = (colors.negative, "D") if value < 0 else (colors.positive, "o")
        ax.plot([place, place], [0, value], color=color, linewidth=1.2, alpha=0.5)
        ax.errorbar(
            place, value, residual, fmt=marker, color=color, mfc=color if sure else "none", markersize=5, capsize=3
        )
    if gap and low:
        ax.annotate("⋯", (k, 0), xytext=(0, 5), textcoords="offset points", ha="center", color=colors.quiet)
    for i in {0, len(values) - 1}:
        text = f"{values[i]:.3g}".replace("-", MINUS)
        ax.annotate(text, (places[i], values[i]), xytext=(8, 4), textcoords="offset points")
    ranks = np.concatenate([1 + np.arange(k), num_params - low + 1 + np.arange(low)])
    shown = [*range(0, k, max(1, math.ceil(k / 10))), *([len(ranks) - 1] if low else [])]
    ax.set_xticks(places[shown], [count(ranks[i]) for i in shown])
    ax.set_xlim(-0.7, places[-1] + 1.8)  # room for the last label
    ax.axhline(0.0, color=colors.quiet, linewidth=0.8, zorder=0)
    ax.set(xlabel="rank", ylabel="eigenvalue λ")
    return ax


# -- layers -----------------------------------------------------------------------------------------------------------


def plot_layers(
    layers: Sequence[LayerCurvature], *, axes: Sequence[Axes] | None = None, colors: Colors | None = None
) -> tuple[Axes, Axes]:
    """Plot for each layer its share of the trace (with a standard error) and its extreme eigenvalues (with residuals).

    Args:
        layers: one or more.
        axes: two axes, for the shares and the eigenvalues; a new figure by default.
        colors: what to paint with.
    """
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7.0, 1.0 + 0.3 * len(layers)), layout="constrained").subplots(1, 2, sharey=True)
    share, extremes = axes
    colors = colors or Colors()
    rows = np.arange(len(layers), dtype=float)
    _draw_shares(share, layers, rows, colors)
    _draw_extremes(extremes, layers, rows, colors)
    for ax in (share, extremes):
        ax.set_yticks(rows, layer_labels(ax, [layer.name for layer in layers]))
        ax.set_ylim(len(layers) - 0.4, -0.6)
    if extremes.get_subplotspec() is not None and extremes in extremes.get_shared_y_axes().get_siblings(share):
        extremes.tick_params(axis="y", labelleft=False)
    return share, extremes


def _draw_shares(ax: Axes, layers: Sequence[LayerCurvature], rows: Array, colors: Colors) -> None:
    trace = np.array([layer.trace.value for layer in layers])
    stderr = np.array([layer.trace.stderr for layer in layers])
    total = abs(trace.sum()) or 1.0
    bars = ax.barh(rows, 100 * trace / total, height=0.6, color=colors.positive, alpha=0.75)
    for bar, value in zip(bars, trace, strict=True):
        if value < 0:
            bar.set(color=colors.negative, hatch="////")
    ax.errorbar(
        100 * trace / total, rows, xerr=100 * stderr / total, fmt="none", color=ink(), capsize=3, elinewidth=1.2
    )
    ax.axvline(0.0, color=colors.quiet, linewidth=0.8)
    ax.set(xlabel="share of the trace (%)")


def _draw_extremes(ax: Axes, layers: Sequence[LayerCurvature], rows: Array, colors: Colors) -> None:
    """Draw largest and, where it is negative, smallest eigenvalue on a logarithmic axis of magnitudes."""
    for name, sign, color, marker, label in (
        ("top", 1, colors.positive, "o", "largest λ"),
        ("bottom", -1, colors.negative, "D", f"{MINUS} smallest λ, where negative"),
    ):
        values = np.array([sign * getattr(layer, name) for layer in layers])
        residuals = np.array([getattr(layer, f"{name}_residual") for layer in layers])
        shown = values > 0
        if shown.any():
            reach = np.stack([np.minimum(residuals, 0.99 * np.abs(values)), residuals])[
                :, shown
            ]  # a log axis has no zero
            ax.errorbar(
                values[shown],
                rows[shown],
                None,
                reach,
                fmt=marker,
                color=color,
                mfc="none" if sign < 0 else color,
                capsize=3,
            )
            ax.plot([], [], marker, color=color, mfc="none" if sign < 0 else color, label=label)
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.grid(axis="y", linewidth=0.5)
    ax.set(xlabel="extreme eigenvalues")
    legend_above(ax, columns=1)
