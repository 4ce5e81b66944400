"""Figures of a race, from its results alone: curves, where each ended, who is ahead of whom, rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.race.results import Axis, Course, Race, RacePair
from analysis.records.measured import Measured
from analysis.show.drawing import Colors, decade_ticks, figure_width, ink, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_race", "plot_race_ends", "plot_race_pairs", "plot_race_rates", "plot_race_single"]

_SHOWN = 4  # curves with a colour of their own
_STYLES = ("-", "--", "-.", ":")
_AXES: tuple[tuple[Axis, str], ...] = (("steps", "steps"), ("seconds", "seconds"), ("gradients", "gradients"))


def plot_race(race: Race, *, axes: Sequence[Axes] | None = None, colors: Colors | None = None) -> Sequence[Axes]:
    """Plot the training loss against steps, seconds and gradients, means over seeds.

    The best at the end of the budget have colours; the others step back.

    Args:
        race: from `race_optimizers`.
        axes: three of them; a new figure by default.
        colors: what to paint with.
    """
    colors = colors or Colors()
    if axes is None:
        from matplotlib.figure import Figure

        axes = list(Figure(figsize=(10.0, 3.6), layout="constrained").subplots(1, 3, sharey=True))
    names = [name for name in race.raced() if race.diverged(name) < 1]
    paint = dict(zip(names, (colors.positive, colors.negative, colors.outlier, ink()), strict=False))
    for ax, (by, label) in zip(axes, _AXES, strict=True):
        for place, name in reversed(list(enumerate(names))):
            x, y = _mean_curve(race, [c for c in race.of(name) if c.finished], by)
            style: dict[str, Any] = {"color": colors.quiet, "linewidth": 0.7, "alpha": 0.6, "zorder": 1}
            if place < _SHOWN:
                style = {
                    "color": paint[name],
                    "linestyle": _STYLES[place],
                    "linewidth": 1.6,
                    "zorder": 3,
                    "label": name,
                }
            ax.plot(x, y, **style)
        _logarithmic(ax, race)
        ax.set(xlabel=label)
    axes[0].set(ylabel="training loss")
    handles, labels = axes[0].get_legend_handles_labels()
    shown = sorted(zip(labels, handles, strict=True), key=lambda pair: names.index(pair[0]))
    if len(names) > _SHOWN:
        shown.append((f"{len(names) - _SHOWN} others", axes[0].plot([], [], color=colors.quiet, linewidth=0.7)[0]))
    columns = 5 if figure_width(axes[0]) > 5 else 3
    canvas = axes[0].get_figure(root=True)
    assert canvas is not None
    style = {"loc": "outside upper left", "frameon": False, "handlelength": 1.8, "columnspacing": 1.4}
    canvas.legend([h for _, h in shown], [label for label, _ in shown], ncols=columns, **style)
    return axes


def _logarithmic(ax: Axes, race: Race) -> None:
    ax.set_xscale("log")
    if race.scale == "log":
        ax.set_yscale("log")
        low = ax.get_ylim()[0]
        ax.set_ylim(bottom=max(low, race.floor))
        decade_ticks(ax.yaxis)
    decade_ticks(ax.xaxis)


def _mean_curve(race: Race, courses: Sequence[Course], by: Axis) -> tuple[list[float], list[float]]:
    """Return the means over seeds of the looks that all have; of losses geometric where they are compared as logs."""
    xs, ys = list[float](), list[float]()
    for points in zip(*(c.points[1:] for c in courses), strict=False):
        x = sum(float(getattr(p, by)) for p in points) / len(points)
        losses = [p.loss for p in points]
        if race.scale == "log":
            y = math.exp(sum(math.log(max(loss, race.floor)) for loss in losses) / len(losses))
        else:
            y = sum(losses) / len(losses)
        xs, ys = [*xs, x], [*ys, y]
    return xs, ys


def plot_race_single(race: Race, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the curve of each entrant in a small panel of its own, every seed, with those of all others behind.

    Args:
        race: from `race_optimizers`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    names = race.raced()
    columns = 4 if figure_width(ax) > 5 else 2
    rows = -(-len(names) // columns)
    curves = {n: _mean_curve(race, [c for c in race.of(n) if c.finished], race.unit) for n in names}
    ends = [y for _, ys in curves.values() for y in ys]
    low, high = (min(ends), max(ends)) if ends else (0.1, 1.0)
    ax.axis("off")
    gap_x, gap_y = 0.03, 0.34 / rows
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        width, height = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
        left, bottom = column * (width + gap_x), 1 - row * (height + gap_y) - height
        panel = ax.inset_axes((left, bottom, width, height))
        for other, (x, y) in curves.items():
            if other != name:
                panel.plot(x, y, color=colors.quiet, linewidth=0.5, alpha=0.5)
        for course in race.of(name):
            x = [float(getattr(p, race.unit)) for p in course.points[1:]]
            y = [max(p.loss, race.floor) if race.scale == "log" else p.loss for p in course.points[1:]]
            bad = bool(course.diverged)
            panel.plot(
                x, y, color=colors.negative if bad else colors.positive, linewidth=1.1, linestyle=":" if bad else "-"
            )
        panel.set_xscale("log")
        if race.scale == "log":
            panel.set_yscale("log")
            panel.set_ylim(0.7 * low, 1.5 * high)
        panel.set_title(f"{place + 1}. {name}", fontsize=8, loc="left", pad=3)
        panel.tick_params(
            labelbottom=row == rows - 1 or place + columns >= len(names), labelleft=column == 0, which="both"
        )
        for axis in (panel.xaxis, panel.yaxis):
            if axis is panel.xaxis or race.scale == "log":
                decade_ticks(axis)
    return ax


def plot_race_ends(
    race: Race, quantities: Sequence[str] = ("loss", "metric"), *, axes: Any = None, colors: Colors | None = None
) -> Any:
    """Plot where each entrant ended: every seed, the mean and its standard error, best first.

    Args:
        race: from `race_optimizers`.
        quantities: "loss", "metric" or names of traits, one for each panel.
        axes: as many; a new figure by default.
        colors: what to paint with.
    """
    colors = colors or Colors()
    if axes is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.6 * len(quantities) + 1, 1.2 + 0.24 * len(race.raced())), layout="constrained")
        axes = figure.subplots(1, len(quantities), sharey=True)
    panels = list(axes) if isinstance(axes, (list, tuple, np.ndarray)) else [axes]
    names = race.raced()
    for ax, quantity in zip(panels, quantities, strict=True):
        shown = [v for name in names for v in _ends(race, name, quantity)]
        logarithmic = (
            race.scale == "log" if quantity == "loss" else bool(shown) and quantity != "metric" and min(shown) > 0
        )
        for place, name in enumerate(names):
            values, mean = _ends(race, name, quantity), race.final(name, quantity)
            ax.plot(values, [place] * len(values), "o", color=colors.quiet, ms=3, alpha=0.7, zorder=2)
            _mean_and_error(ax, mean, place, colors.positive)
            if lost := sum(bool(c.diverged) for c in race.of(name)):
                x = [0.985 - 0.025 * i for i in range(lost)]
                ax.plot(x, [place] * lost, "x", color=colors.negative, ms=4, transform=ax.get_yaxis_transform())
        if logarithmic and shown:
            ax.set_xscale("log")
            decade_ticks(ax.xaxis)
        else:
            ax.locator_params(axis="x", nbins=5)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.grid(axis="y", linewidth=0.5)
        ax.set(xlabel=_label(race, quantity))
    return axes


def _ends(race: Race, name: str, quantity: str) -> list[float]:
    found = [
        getattr(c.end, quantity) if quantity in ("loss", "metric") else c.trait(quantity).value
        for c in race.of(name)
        if c.finished
    ]
    return [max(v, race.floor) if quantity == "loss" and race.scale == "log" else v for v in found if math.isfinite(v)]


def _mean_and_error(ax: Axes, mean: Measured, place: int, color: str) -> None:
    if not math.isfinite(mean.value):
        return
    if math.isfinite(mean.stderr):
        ax.plot([mean.value - mean.stderr, mean.value + mean.stderr], [place] * 2, color=color, linewidth=2.2, zorder=3)
    ax.plot(mean.value, place, "D", color=color, ms=4, zorder=4)


def _label(race: Race, quantity: str) -> str:
    if quantity == "loss":
        return "training loss at the end"
    if quantity == "metric":
        return race.metric
    return {"top_eigenvalue": "largest eigenvalue", "noise": "gradient noise, tr Σ"}.get(
        quantity, quantity.replace("_", " ")
    )


def plot_race_pairs(
    race: Race, pairs: Sequence[RacePair] | None = None, *, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot who is ahead of whom: rows against columns.

    Args:
        race: from `race_optimizers`.
        pairs: those to show; by training loss at the end of the budget by default.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    names, pairs = list(race.raced()), race.pairs if pairs is None else pairs
    places = {name: i for i, name in enumerate(names)}
    marks: dict[str, list[tuple[int, int]]] = {"ahead": [], "behind": [], "undecided": []}
    turned = {"ahead": "behind", "behind": "ahead", "undecided": "undecided"}
    for pair in pairs:
        if pair.first in places and pair.second in places:
            i, j = places[pair.first], places[pair.second]
            marks[pair.verdict].append((j, i))
            marks[turned[pair.verdict]].append((i, j))
    looks = (
        ("ahead", "s", colors.positive, 7.0),
        ("behind", "s", colors.negative, 4.0),
        ("undecided", ".", colors.quiet, 4.0),
    )
    for verdict, marker, color, size in looks:
        x, y = [i for i, _ in marks[verdict]], [j for _, j in marks[verdict]]
        ax.plot(
            x,
            y,
            marker,
            color=color,
            ms=size,
            linestyle="",
            label=f"row {verdict}" if verdict != "undecided" else verdict,
        )
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_aspect("equal")
    legend_above(ax, columns=1 if len(names) < 8 else 3)
    return ax


def plot_race_rates(race: Race, *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the rates that each search tried, over the one it chose, and which keep nine tenths of the best fall.

    Args:
        race: from `race_optimizers`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    names = [name for name in race.raced() if race.searches(name)]
    names.sort(key=lambda name: -_width(race, name))
    seen: set[str] = set()

    def draw(xs: list[float], place: int, marker: str, label: str, **style: Any) -> None:
        ax.plot(xs, [place] * len(xs), marker, label=None if label in seen else label, **style)
        if xs:
            seen.add(label)

    for place, name in enumerate(names):
        chosen, courses = race[name].lr, race.searches(name)
        least = min(c.share for c in courses)
        first = [c for c in courses if c.share == least]
        low, high, _ = race.range_kept(name)
        if math.isfinite(low):
            draw(
                [low / chosen, high / chosen], place, "-", "keeps 9/10", color=colors.positive, linewidth=5, alpha=0.35
            )
        draw([c.lr / chosen for c in first if c.finished], place, "o", "tried", color=colors.quiet, ms=4)
        draw([c.lr / chosen for c in first if not c.finished], place, "x", "diverged", color=colors.negative, ms=4)
        draw([1.0], place, "D", "chosen", color=colors.positive, ms=5)
    ax.set_xscale("log")
    decade_ticks(ax.xaxis)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", linewidth=0.5)
    ax.set(xlabel="rate over the chosen one")
    legend_above(ax, columns=4)
    return ax


def _width(race: Race, name: str) -> float:
    low, high, _ = race.range_kept(name)
    return high / low if math.isfinite(low) else 0.0
