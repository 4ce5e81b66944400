"""Figures of implicit bias: what training found, and what its theorem says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, ink, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.implicit_bias.results import DeepLinearRun, DiagonalRun, LabelNoiseRun

__all__ = ["plot_completion", "plot_deep_linear", "plot_diagonal_linear", "plot_label_noise"]

_STYLES = ("-", "--", "-.", ":")


def _layers(depth: int) -> str:
    return f"{depth} layer{'' if depth == 1 else 's'}"


def plot_deep_linear(run: DeepLinearRun, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the singular values of the product against time, and the closed form as broken lines.

    Args:
        run: from `train_deep_linear`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    times, found, expected = to_numpy(run.times), to_numpy(run.singular_values), to_numpy(run.expected)
    for k in range(found.shape[1]):
        ax.plot(
            times, found[:, k], color=colors.positive, linewidth=2.2, alpha=0.6, label="training" if k == 0 else None
        )
        if np.isfinite(expected).all():
            name = "closed form" if k == 0 else None
            ax.plot(times, expected[:, k], color=ink(), linewidth=1.0, linestyle=(0, (3, 2)), label=name)
    ax.set(xlabel="time: steps times learning rate", ylabel=f"singular values, {_layers(run.depth)}")
    legend_above(ax, columns=2)
    return ax


def plot_completion(
    runs: Sequence[DeepLinearRun],
    *,
    quantity: Literal["hidden_error", "effective_rank"] = "hidden_error",
    ax: Axes | None = None,
    colors: Colors | None = None,
) -> Axes:
    """Plot the error on entries that training did not see, or the effective rank, against time, a line for each depth.

    Args:
        runs: from `train_deep_linear`, of one matrix.
        quantity: "hidden_error", relative, or "effective_rank".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    paint = (colors.quiet, colors.positive, colors.negative, colors.outlier)
    for i, run in enumerate(runs):
        times, values = to_numpy(run.times)[1:], to_numpy(getattr(run, quantity))[1:]
        style, color = _STYLES[i % len(_STYLES)], paint[i % len(paint)]
        ax.plot(times, values, style, color=color, linewidth=1.6, label=_layers(run.depth))
    names = {"hidden_error": "error on hidden entries, relative", "effective_rank": "effective rank"}
    ax.set(xscale="log", yscale="log", xlabel="time: steps times learning rate", ylabel=names[quantity])
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    legend_above(ax, columns=3)
    return ax


def plot_diagonal_linear(
    runs: DiagonalRun | Sequence[DiagonalRun], *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot how far the solutions of several starts are from those of least l1 and least l2 norm, and from theory.

    Args:
        runs: from `diagonal_linear_flow`, of one X and y.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    runs = sorted([runs] if not isinstance(runs, Sequence) else runs, key=lambda run: run.alpha)
    alphas = [run.alpha for run in runs]
    for name, values, color, mark in (
        ("least l1 norm", [run.distance(run.least_l1) for run in runs], colors.positive, "o"),
        ("least l2 norm", [run.distance(run.least_l2) for run in runs], colors.negative, "s"),
        ("least Q, the theorem", [run.distance(run.expected) for run in runs], colors.quiet, "^"),
    ):
        ax.plot(alphas, values, color=color, marker=mark, markersize=4, linewidth=1.3, label=name)
    ax.set(xscale="log", yscale="log", xlabel="size of the start, α", ylabel="distance of the solution, relative")
    decade_ticks(ax.xaxis)
    decade_ticks(ax.yaxis)
    legend_above(ax, columns=3)
    return ax


def plot_label_noise(
    runs: LabelNoiseRun | Sequence[LabelNoiseRun], *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot tr H along SGD with label noise, the flow of the theorem, and the smallest that any solution has.

    Args:
        runs: from `label_noise_descent`; several that differ in their seeds are drawn with their mean.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    every = [runs] if not isinstance(runs, Sequence) else list(runs)
    run, times = every[0], to_numpy(every[0].times)
    found = np.stack([to_numpy(each.trace) for each in every])
    label = "label noise" + (f", {len(every)} seeds" if len(every) > 1 else "")
    if len(every) > 1:
        ax.fill_between(times, found.min(0), found.max(0), color=colors.positive, alpha=0.2, linewidth=0)
    ax.plot(times, found.mean(0), color=colors.positive, linewidth=2.2, alpha=0.6, label=label)
    flow = to_numpy(run.expected_trace)
    ax.plot(times, flow, color=ink(), linewidth=1.0, linestyle=(0, (3, 2)), label="its flow")
    ax.axhline(run.least_trace, color=colors.quiet, linewidth=0.9, linestyle=(0, (1, 2)), label="flattest")
    ax.set(xlabel="time: steps times learning rate²", ylabel="tr H")
    ax.set_ylim(bottom=0)
    legend_above(ax, columns=3)
    return ax
