"""Figures of the loss around a point: curves beside their quadratic model, contours, surfaces, paths.

Each takes results only, draws into given axes or a new figure, and returns the axes. Colours of height are those of
cividis, which every kind of colour vision and a grey printer order alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.show.drawing import Array, Colors, figure_width, ink, legend_above, new_axes, to_numpy
from analysis.show.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]  # has no types

    from analysis.landscape.results import LossPath, LossPlane, LossSlice, Trajectory

__all__ = [
    "color_stops",
    "contour_levels",
    "is_logarithmic",
    "plot_paths",
    "plot_plane",
    "plot_slice",
    "plot_surface",
]

_COLORMAP = "cividis"
_FACES = 36  # of the surface, along each side: more would swell the file and show nothing
_LOGARITHMIC = 20.0  # ratio of losses from which heights are logarithmic
_DARK = 0.55  # luminance below which labels on a colour are white


def plot_slice(
    slice_: LossSlice, *, deviation: float = 0.1, ax: Axes | None = None, colors: Colors | None = None
) -> Axes:
    """Plot the loss along a direction, its error over the data, and the quadratic model at the centre.

    The shaded strip is where the model holds; the axis is cut to the losses, whatever the model does.

    Args:
        slice_: from `analysis.landscape.measure.loss_along`.
        deviation: how far the model may be off the predicted change in the strip, relatively.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    t, losses, stderr = to_numpy(slice_.steps), to_numpy(slice_.losses), to_numpy(slice_.stderr)
    low, high, logarithmic = _range(losses)
    fine = np.linspace(t[0], t[-1], 400)
    model = slice_.centre + slice_.slope * fine + slice_.curvature * fine**2 / 2
    radius = slice_.quadratic_radius(deviation)
    reach = min(radius, max(abs(t[0]), abs(t[-1])))
    holds = f"model within {100 * deviation:.0f} %"
    ax.axvspan(max(-reach, t[0]), min(reach, t[-1]), color=colors.quiet, alpha=0.18, linewidth=0, label=holds)
    if np.isfinite(stderr).any():
        floor = 0.1 * low if logarithmic else -np.inf
        ax.fill_between(
            t,
            np.maximum(losses - stderr, floor),
            losses + stderr,
            color=colors.positive,
            alpha=0.3,
            linewidth=0,
            label="± other data",
        )
    ax.plot(t, losses, color=colors.positive, linewidth=1.8, label="loss")
    shown = np.where(model > (0.02 * low if logarithmic else -np.inf), model, np.nan)
    ax.plot(fine, shown, color=colors.negative, linewidth=1.4, linestyle=(0, (4, 2)), label="quadratic")
    ax.plot(0, slice_.centre, "o", color=ink(), markersize=3.5, zorder=4)
    _loss_axis(ax, low, high, logarithmic)
    ax.set_xlim(t[0], t[-1])
    ax.set(xlabel=f"step along {slice_.direction.name} (|d| = {number(slice_.direction.norm, 3)})", ylabel="loss")
    legend_above(ax, columns=4 if figure_width(ax) > 5 and len(ax.figure.axes) == 1 else 2)
    return ax


def plot_paths(paths: LossPath | Sequence[LossPath], *, ax: Axes | None = None, colors: Colors | None = None) -> Axes:
    """Plot the loss along paths between the same two ends, and the line between the ends that a barrier is above.

    Args:
        paths: from `loss_along_path`.
        ax: where to draw; a new figure by default.
        colors: what to paint with.
    """
    ax, colors = new_axes(ax), colors or Colors()
    paths = [paths] if not isinstance(paths, Sequence) else paths
    losses = np.concatenate([to_numpy(path.losses) for path in paths])
    low, high, logarithmic = _range(losses)
    styles: dict[str, Any] = {
        "straight": {"color": colors.negative, "linestyle": (0, (4, 2))},
        "curved": {"color": colors.positive, "linestyle": "-"},
    }
    for path in paths:
        t, values, stderr = to_numpy(path.positions), to_numpy(path.losses), to_numpy(path.stderr)
        style = styles[path.kind]
        if np.isfinite(stderr).any():
            floor = 0.1 * low if logarithmic else -np.inf
            ax.fill_between(
                t, np.maximum(values - stderr, floor), values + stderr, color=style["color"], alpha=0.22, linewidth=0
            )
        ax.plot(t, values, linewidth=1.8, label=f"{path.kind}, barrier {number(path.barrier, 3)}", **style)
    ends = [float(paths[0].losses[0]), float(paths[0].losses[-1])]
    ax.plot([0, 1], ends, color=colors.quiet, linewidth=0.9, linestyle=":", label="between the ends")
    ax.plot([0, 1], ends, "o", color=ink(), markersize=3.5, zorder=4)
    _loss_axis(ax, low, high, logarithmic)
    ax.set_xlim(-0.02, 1.02)
    ax.set(xlabel=f"position, from {paths[0].start} to {paths[0].end}", ylabel="loss")
    legend_above(ax, columns=3 if figure_width(ax) > 5 else 1)
    return ax


def plot_plane(
    plane: LossPlane,
    *,
    show: Literal["loss", "model"] = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Plot contours of the loss on a plane, or those of its quadratic model at the same levels.

    Lengths along the two directions are drawn alike (per step), so the shape is true where both are of equal length and
    at right angles. A trajectory is drawn through the projections of its checkpoints.

    Args:
        plane: from `analysis.landscape.measure.loss_on_plane`.
        show: the loss, or the model.
        ax: where to draw; a new figure by default.
    """
    ax = new_axes(ax)
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    x, y = to_numpy(plane.x), to_numpy(plane.y)
    levels = contour_levels(to_numpy(plane.losses))
    values = to_numpy(plane.losses if show == "loss" else plane.model())
    inside = np.ma.masked_invalid(values)
    map_ = colormaps[_COLORMAP]
    norm = BoundaryNorm(levels, map_.N, extend="both")
    ax.contourf(x, y, inside, levels=levels, cmap=map_, norm=norm, extend="both", zorder=0)
    shades = [_luminance(map_(norm(0.5 * (a + b)))) for a, b in zip(levels, [*levels[1:], levels[-1]], strict=True)]
    inks = ["#ffffff" if shade < _DARK else "#111111" for shade in shades]
    lines = ax.contour(x, y, inside, levels=levels, colors=inks, linewidths=0.5, alpha=0.75, zorder=1)
    ax.clabel(lines, fmt=lambda level: f"{level:.3g}", fontsize=6.5, colors=inks, inline_spacing=2)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    if plane.trajectory is not None:
        _draw_trajectory(ax, plane.trajectory)
    ax.plot(0, 0, "*", color="#ffffff", markeredgecolor="#111111", markeredgewidth=0.7, markersize=10, zorder=5)
    ax.set_aspect("equal")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set(xlabel=plane.first.name, ylabel=plane.second.name)
    ax.set_title("loss" if show == "loss" else "quadratic model at the star", fontsize="medium")
    return ax


def plot_surface(plane: LossPlane, *, ax: Axes3D | None = None, azimuth: float = -60, elevation: float = 35) -> Axes3D:
    """Plot the loss on a plane as a surface; heights are logarithmic where losses span more than a decade or so.

    Args:
        plane: from `analysis.landscape.measure.loss_on_plane`.
        ax: three-dimensional axes; a new figure by default.
        azimuth: where it is looked at from, degrees.
        elevation: likewise, above the plane.
    """
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(5.6, 4.6), layout="constrained").add_subplot(projection="3d")
    x, y, losses = to_numpy(plane.x), to_numpy(plane.y), to_numpy(plane.losses)
    columns, rows = (np.unique(np.linspace(0, len(v) - 1, min(len(v), _FACES)).round().astype(int)) for v in (x, y))
    losses = losses[np.ix_(rows, columns)]
    _, _, logarithmic = _range(losses)
    heights = np.log10(losses) if logarithmic else losses
    X, Y = np.meshgrid(x[columns], y[rows])
    style: Any = {"rcount": _FACES, "ccount": _FACES, "linewidth": 0.15, "edgecolor": "#00000055", "antialiased": True}
    ax.plot_surface(X, Y, heights, cmap=_COLORMAP, **style)
    ax.view_init(elev=elevation, azim=azimuth)
    ax.set(xlabel=plane.first.name, ylabel=plane.second.name, zlabel="log₁₀ loss" if logarithmic else "loss")
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((0.5, 0.5, 0.5, 0.06))
        axis._axinfo["grid"].update(linewidth=0.3)
        axis.set_tick_params(pad=0, labelsize=6.5)
    return ax


def contour_levels(losses: Array) -> list[float]:
    """Return 6 to 14 round levels between the smallest and largest loss: 1, 2, 5 a decade where losses span decades.

    Where the losses are within a factor of 20, or not all positive, levels are evenly spaced.
    """
    low, high, logarithmic = _range(losses)
    if logarithmic:
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            levels = [float(f"{d}e{e}") for e in decades for d in digits]
            levels = [level for level in levels if low < level < high]
            if len(levels) <= 14:
                break
        else:
            levels = levels[:: math.ceil(len(levels) / 14)]
        if len(levels) >= 3:
            return levels
    from matplotlib.ticker import MaxNLocator

    if not high > low:  # a flat loss has no contours; two levels around it leave it blank
        return [low - 1, low + 1]
    inner = [float(level) for level in MaxNLocator(12).tick_values(low, high) if low < level < high]
    return inner if len(inner) >= 2 else [low, high]


def is_logarithmic(losses: Array) -> bool:
    """Return whether losses are positive and span enough for a logarithmic scale."""
    return _range(losses)[2]


def color_stops(count: int = 17) -> list[list[int]]:
    """Return the colours of heights at evenly spaced levels, from low to high: red, green and blue up to 255."""
    from matplotlib import colormaps

    map_ = colormaps[_COLORMAP]
    return [[round(255 * c) for c in map_(i / (count - 1))[:3]] for i in range(count)]


def _draw_trajectory(ax: Axes, trajectory: Trajectory) -> None:
    x, y = to_numpy(trajectory.coordinates).T
    ax.plot(x, y, color="#ffffff", linewidth=3.0, zorder=3)
    ax.plot(x, y, color="#d55e00", linewidth=1.5, zorder=3)
    ax.plot(x, y, "o", color="#d55e00", markeredgecolor="#ffffff", markeredgewidth=0.7, markersize=4.5, zorder=4)
    low, high = ax.get_xlim()

    def leftwards(place: float) -> bool:
        return place < low + 0.7 * (high - low)

    box: Any = {"boxstyle": "round,pad=0.15", "facecolor": "#ffffffd0", "edgecolor": "none"}
    for i in {0, len(x) - 1}:
        ax.annotate(
            trajectory.names[i],
            (x[i], y[i]),
            xytext=(6 if leftwards(x[i]) else -6, 5),
            ha="left" if leftwards(x[i]) else "right",
            textcoords="offset points",
            fontsize=6.5,
            color="#111111",
            bbox=box,
            zorder=6,
        )


def _range(losses: Array) -> tuple[float, float, bool]:
    """Return the smallest and largest finite loss, and whether a logarithmic scale shows more of them."""
    finite = losses[np.isfinite(losses)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return low, high, low > 0 and high > _LOGARITHMIC * low


def _loss_axis(ax: Axes, low: float, high: float, logarithmic: bool) -> None:
    if logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_yscale("log")
        ax.set_ylim(low / 1.6, high * 1.6)
        decades = math.log10(high / low)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.7 else (1.0,), numticks=8))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, 1)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (high - low) or max(abs(low), 1.0) * 0.1
        ax.set_ylim(low - margin, high + margin)


def _luminance(color: Sequence[float]) -> float:
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]
