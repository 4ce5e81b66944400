"""Figures of a training run: its stability, its loss, penalties and noise scale, from readings alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.show.drawing import Array, Colors, decade_ticks, legend_above, new_axes, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.training.results import TrainingRecord

__all__ = ["plot_layer_sharpness", "plot_predictions", "plot_stability", "plot_training"]


def plot_stability(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot sharpness and critical sharpness over the threshold of stability, against steps; 1 is the edge.

    Args:
        result: from `CurvatureTracker.record`, with thresholds.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    threshold = to_numpy(result.series("threshold"))
    own = to_numpy(result.series("preconditioned"))
    plain = to_numpy(result.series("sharpness"))
    if np.isnan(own).all() or np.array_equal(own, plain, equal_nan=True):
        _line(ax, result, plain / threshold, colors.positive, "-", "sharpness / threshold")
    else:
        _line(ax, result, own / threshold, colors.positive, "-", "preconditioned sharpness / threshold")
    critical = to_numpy(result.series("critical_sharpness")) * to_numpy(result.series("lr")) / 2
    _line(ax, result, critical, colors.negative, "--", "critical sharpness · lr / 2")
    ax.axhline(1, color=colors.quiet, linewidth=0.9)
    drawn = np.concatenate([own / threshold, plain / threshold, critical])
    shown = drawn[np.isfinite(drawn) & (drawn > 0)]
    if len(shown) and shown.max() > 10 * shown.min():
        ax.set_yscale("log")
        decade_ticks(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="step", ylabel="over the edge of stability")
    legend_above(ax, columns=2)
    return ax


def plot_predictions(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the change of the loss over single steps beside what gradient and curvature predict of it.

    Args:
        result: with the quantity "update".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    for name, label, color, style in (
        ("change", "true change", colors.positive, "-"),
        ("linear_change", "linear prediction", colors.quiet, ":"),
        ("quadratic_change", "quadratic prediction", colors.negative, "--"),
    ):
        _line(ax, result, to_numpy(result.series(name)), color, style, label)
    true = np.abs(to_numpy(result.series("change")))
    small = true[np.isfinite(true) & (true > 0)]
    ax.set_yscale("symlog", linthresh=float(np.median(small)) if len(small) else 1e-6)
    ax.axhline(0, color=colors.quiet, linewidth=0.6)
    ax.set(xlabel="step", ylabel="change of the loss in a step")
    legend_above(ax, columns=3)
    return ax


def plot_layer_sharpness(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the sharpness of each layer against steps.

    Args:
        result: with the quantity "layers".
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    names = list(dict.fromkeys(name for reading in result.readings for name in reading.layers))
    styles, paints = ("-", "--", ":", "-."), (colors.positive, colors.negative, colors.outlier, colors.quiet)
    for i, name in enumerate(names):
        values = np.array([reading.layers.get(name, np.nan) for reading in result.readings])
        values = np.where(values > 0, values, np.nan)
        _line(ax, result, values, paints[i % len(paints)], styles[i // len(paints) % len(styles)], name)
    ax.set_yscale("log")
    ax.autoscale_view()
    decade_ticks(ax.yaxis)
    ax.set(xlabel="step", ylabel="sharpness of the layer")
    legend_above(ax, columns=4)
    return ax


def plot_training(result: TrainingRecord, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the losses of a run, and where they were measured both penalties and, at the right, the noise scale.

    Args:
        result: from `CurvatureTracker.record`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    for field, label, color, style in (
        ("loss", "loss on the probe", colors.positive, "-"),
        ("train_loss", "training loss", colors.outlier, ":"),
        ("full_penalty", "penalty of the full gradient", colors.negative, "--"),
        ("batch_penalty", "penalty of the noise", colors.negative, "-."),
    ):
        values = to_numpy(result.series(field))
        _line(ax, result, np.where(values > 0, values, np.nan), color, style, label)
    ax.set_yscale("log")
    decade_ticks(ax.yaxis)
    ax.set(xlabel="step", ylabel="loss")
    scales = to_numpy(result.series("noise_scale"))
    if not np.isnan(scales).all():
        _noise_scale(ax, result, scales, colors)
    legend_above(ax, columns=2)
    return ax


def _noise_scale(ax: Axes, result: TrainingRecord, scales: Array, colors: Colors) -> None:
    low, high = (to_numpy(result.series(name)) for name in ("noise_scale_lower", "noise_scale_upper"))
    steps = np.asarray(result.steps, dtype=float)
    shown = np.where((scales > 0) & np.isfinite(scales), scales, np.nan)
    size = result.batch_size
    right = ax.twinx()
    top = 3 * np.nanmax(shown, initial=1.0)
    right.fill_between(
        steps, np.maximum(low, 0.1), np.minimum(high, top), color=colors.quiet, alpha=0.25, linewidth=0, step=None
    )
    right.plot(steps, shown, linestyle="-.", marker=_marker(result), color=colors.quiet, linewidth=1.8)
    ax.plot([], [], "-.", color=colors.quiet, linewidth=1.8, label="noise scale (right)")
    right.set_yscale("log")
    decade_ticks(right.yaxis)
    bottom = 0.7 * np.nanmin(shown, initial=top)
    if size is not None:
        right.axhline(size, color=colors.quiet, linewidth=0.9)
        right.annotate(
            f"batch size {size}",
            (0.99, size),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment="right",
        )
        bottom, top = min(0.5 * size, bottom), max(top, 2 * size)
    right.set_ylim(bottom, top)
    right.set_ylabel("examples")
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)


def _line(ax: Axes, result: TrainingRecord, values: Array, color: str, style: str, label: str) -> None:
    """Draw a series, if any of it was measured."""
    if np.isfinite(values).any():
        steps = np.asarray(result.steps, dtype=float)
        ax.plot(steps, values, color=color, linestyle=style, marker=_marker(result), linewidth=1.6, label=label)


def _marker(result: TrainingRecord) -> str:
    return "o" if len(result.readings) == 1 else ""  # a line of one point cannot be seen
