"""Figures of implicit bias: what training found, and what its theorem says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Colors, decade_ticks, ink, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.generalization.implicit_bias.results import DeepLinearRun, DiagonalRun, LabelNoiseRun

__all__ = ["plot_deep_linear", "plot_diagonal_linear", "plot_label_noise"]


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
    ax.set(xlabel="time: steps times learning rate", ylabel=f"singular values, {run.depth} layers")
    legend_above(ax, columns=2)
    return ax


def plot_diagonal_linear(runs: Sequence[DiagonalRun], *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot how far the solutions of several starts are from those of least l1 and least l2 norm, and from theory.

    Args:
        runs: from `diagonal_linear_flow`, of one X and y.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    runs = sorted(runs, key=lambda run: run.alpha)
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


def plot_label_noise(run: LabelNoiseRun, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot tr H along SGD with label noise, the flow of the theorem, and the smallest that any solution has.

    Args:
        run: from `label_noise_descent`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    times = to_numpy(run.times)
    ax.plot(times, to_numpy(run.trace), color=colors.positive, linewidth=2.2, alpha=0.6, label="SGD with label noise")
    ax.plot(
        times,
        to_numpy(run.expected_trace),
        color=ink(),
        linewidth=1.0,
        linestyle=(0, (3, 2)),
        label="flow of the theorem",
    )
    ax.axhline(run.least_trace, color=colors.quiet, linewidth=0.9, linestyle=(0, (1, 2)), label="flattest solution")
    ax.set(xlabel="time: steps times learning rate²", ylabel="tr H")
    ax.set_ylim(bottom=0)
    legend_above(ax, columns=3)
    return ax
