"""The report of a landscape: one HTML page that needs nothing beside it, and its figures as PDF for papers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.landscape.figures import color_stops, is_logarithmic, plot_paths, plot_plane, plot_slice, plot_surface
from analysis.landscape.results import Landscape, LossPlane, LossSlice
from analysis.landscape.store import LandscapeRun, load_landscape
from analysis.records.plain import to_plain
from analysis.run.saving import write_figure, write_text
from analysis.show import wording
from analysis.show.account import Finding
from analysis.show.drawing import to_numpy
from analysis.show.page import COLORS, NARROW, WIDE, svg, templates, two_sizes

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["build_landscape_report", "write_landscape_report"]

_HINT = "Point at the surface to read values."


def write_landscape_report(folder: Path) -> Path:
    """Write report.html and the figures as PDF into a run folder, and return the report's path."""
    run = load_landscape(folder)
    path = folder / "report.html"
    write_text(path, build_landscape_report(run))
    for name, figure in _publication(run.landscape).items():
        write_figure(folder / f"{name}.pdf", figure)
    return path


def build_landscape_report(run: LandscapeRun) -> str:
    """Return the report of a run as one self-contained HTML page."""
    landscape, plane = run.landscape, run.landscape.plane
    return (
        templates()
        .get_template("landscape.html")
        .render(
            run=run,
            landscape=landscape,
            cards=_cards(landscape),
            findings=_findings(landscape),
            figures=_figures(landscape),
            slices=[_slice_row(s) for s in landscape.slices],
            checkpoints=_checkpoint_rows(plane),
            scalings={s.direction.scaling for s in landscape.slices},
            surface=None if plane is None else _surface_data(plane),
            surface_label="" if plane is None else _surface_label(plane),
            logarithmic=plane is not None and is_logarithmic(to_numpy(plane.losses)),
            landscape_positive=plane is not None and bool((plane.losses.nan_to_num(nan=1.0) > 0).all()),
        )
    )


# -- what stands in it ------------------------------------------------------------------------------------------------


def _cards(landscape: Landscape) -> list[dict[str, str]]:
    number = wording.number
    entries = [("Loss", number(landscape.loss), "", f"mean over {wording.count(landscape.total_weight)} terms")]
    if not landscape.paths:
        entries.append(("Gradient norm", number(landscape.gradient_norm), "", "zero at a stationary point"))
    for s in landscape.slices:
        tenth, _ = _radii(s)
        entries.append(
            (f"Model holds, {s.direction.name}", tenth, "steps, to 10 %", "how far the parabola is the loss")
        )
    for path in landscape.paths[-1:]:
        straight = landscape.paths[0].barrier
        hint = f"{number(straight, 3)} on the straight path" if path.kind == "curved" else f"on the way to {path.end}"
        entries.append((f"Barrier, {path.kind}", number(path.barrier, 3), "", hint))
    names = ("label", "value", "error", "hint")
    return [dict(zip(names, entry, strict=True)) for entry in entries]


def _findings(landscape: Landscape) -> list[Finding]:
    number, found = wording.number, []
    radii = [s.quadratic_radius(0.1) for s in landscape.slices]
    parts = [
        f"{_radii(s)[0]} steps along {s.direction.name} ({number(r * s.direction.norm, 2)} of distance)"
        if math.isfinite(r)
        else f"as far as was looked along {s.direction.name}"
        for s, r in zip(landscape.slices, radii, strict=True)
    ]
    text = f"To 10 % it predicts the change of the loss up to {' and up to '.join(parts)}"
    found.append(Finding("How far does the quadratic model hold?", text + "."))
    lowest = min(
        [(float(s.losses.nan_to_num(nan=math.inf).min()), s.direction.name) for s in landscape.slices]
        + (
            []
            if landscape.plane is None
            else [(float(landscape.plane.losses.nan_to_num(nan=math.inf).min()), "the plane")]
        )
    )
    if lowest[0] < landscape.loss * (1 - 1e-4) - 1e-12:
        lower = number(100 * (1 - lowest[0] / landscape.loss), 2)
        text = f"No: {lowest[1]} holds a loss of {number(lowest[0])}, {lower} % lower."
    else:
        text = f"Yes: no point that was looked at lies below its loss of {number(landscape.loss)}."
    found.append(Finding("Is the model the lowest point in view?", text))
    bends = [s for s in landscape.slices if s.curvature < 0]
    text = (
        f"It is negative along {' and '.join(s.direction.name for s in bends)}: there the loss bends downwards."
        if bends
        else "It is positive along every direction that was looked along."
    )
    found.append(Finding("Which way does it curve?", text))
    if landscape.paths:
        straight = landscape.paths[0]
        text = f"The straight path rises by {number(straight.barrier, 3)} above the line between the ends"
        text += f", at t = {number(straight.barrier_position, 2)}" if straight.barrier > 0 else ""
        if len(landscape.paths) > 1:
            curved = landscape.paths[1]
            longer = 100 * (curved.length / straight.length - 1)
            text += f"; the curved one by {number(curved.barrier, 3)}, and is {number(longer, 2)} % longer"
        found.append(Finding(f"Is there a barrier to {straight.end}?", text + "."))
    return found


def _slice_row(s: LossSlice) -> dict[str, Any]:
    losses = s.losses.nan_to_num(nan=math.inf)
    tenth, half = _radii(s)
    return {
        "name": s.direction.name,
        "scaling": s.direction.scaling,
        "norm": s.direction.norm,
        "slope": s.slope,
        "curvature": s.curvature,
        "tenth": tenth,
        "half": half,
        "lowest": float(losses.min()),
        "at": float(s.steps[losses.argmin()]),
    }


def _radii(s: LossSlice) -> tuple[str, str]:
    """Return the radii to 10 % and to 50 % as text, "> R" where the model holds as far as was looked."""
    beyond = f"> {wording.number(float(s.steps.abs().max()), 3)}"
    radii = (s.quadratic_radius(deviation) for deviation in (0.1, 0.5))
    first, second = (wording.number(r, 3) if math.isfinite(r) else beyond for r in radii)
    return first, second


def _checkpoint_rows(plane: LossPlane | None) -> list[dict[str, Any]]:
    if plane is None or plane.trajectory is None:
        return []
    t = plane.trajectory
    columns = (
        t.names,
        t.coordinates[:, 0].tolist(),
        t.coordinates[:, 1].tolist(),
        t.distances.tolist(),
        t.losses.tolist(),
    )
    keys = ("name", "first", "second", "distance", "loss")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _surface_data(plane: LossPlane) -> dict[str, Any]:
    """Return what the script draws from, as JSON can hold it."""

    def rounded(values: Any) -> Any:
        if isinstance(values, list):
            return [rounded(v) for v in values]
        return None if values is None else float(f"{values:.5g}")

    t = plane.trajectory
    lines = [] if t is None else [{"x": t.coordinates[:, 0].tolist(), "y": t.coordinates[:, 1].tolist()}]
    return {
        "x": plane.x.tolist(),
        "y": plane.y.tolist(),
        "loss": rounded(to_plain(plane.losses)),
        "model": rounded(to_plain(plane.model())),
        "centre": plane.centre,
        "names": [plane.first.name, plane.second.name],
        "trajectory": lines,
        "logarithmic": is_logarithmic(to_numpy(plane.losses)),
        "colors": color_stops(),
        "hint": _HINT,
    }


def _surface_label(plane: LossPlane) -> str:
    finite = plane.losses[plane.losses.isfinite()]
    low, high = wording.number(float(finite.min())), wording.number(float(finite.max()))
    return (
        f"Surface of the loss over {plane.first.name} and {plane.second.name}, from {low} to {high}; "
        f"{wording.number(plane.centre)} at the model."
    )


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(landscape: Landscape) -> dict[str, Markup]:
    figures = {"slices": _slices(landscape.slices)}
    if landscape.plane is not None:
        figures |= _plane(landscape.plane)
    if landscape.paths:
        about = ", ".join(
            f"{path.kind} with a barrier of {wording.number(path.barrier, 3)}" for path in landscape.paths
        )
        figures["paths"] = two_sizes(
            "paths",
            f"Loss along paths: {about}.",
            lambda ax: plot_paths(landscape.paths, ax=ax, colors=COLORS),
            height=2.9,
        )
    return figures


def _slices(slices: tuple[LossSlice, ...]) -> Markup:
    from markupsafe import Markup

    names = " and ".join(s.direction.name for s in slices)
    label = f"Loss along {names}, each with its quadratic model; the table below has the numbers."

    def draw(figure: Figure, rows: int, columns: int) -> None:
        for s, ax in zip(slices, figure.subplots(rows, columns, squeeze=False).flat, strict=True):
            plot_slice(s, ax=ax, colors=COLORS)

    k = len(slices)
    wide = svg("slices-wide", label, lambda figure: draw(figure, 1, k), (WIDE, 3.0))
    narrow = svg("slices-narrow", label, lambda figure: draw(figure, k, 1), (NARROW, 2.9 * k))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def _plane(plane: LossPlane) -> dict[str, Markup]:
    from markupsafe import Markup

    label = f"Contours of the loss and of its quadratic model over {plane.first.name} and {plane.second.name}."

    def draw(figure: Figure, rows: int, columns: int) -> None:
        first, second = figure.subplots(rows, columns).flat
        plot_plane(plane, ax=first)
        plot_plane(plane, show="model", ax=second)

    aspect = float((plane.y[-1] - plane.y[0]) / (plane.x[-1] - plane.x[0]))
    wide = svg("plane-wide", label, lambda figure: draw(figure, 1, 2), (WIDE, min(6.0, max(2.2, 0.8 + 2.95 * aspect))))
    height = min(9.0, max(3.4, 1.6 + 5.4 * aspect))
    narrow = svg("plane-narrow", label, lambda figure: draw(figure, 2, 1), (NARROW, height))
    still = svg("surface-wide", _surface_label(plane), lambda figure: _still(plane, figure), (WIDE, 5.0))
    return {"plane": Markup(wide + narrow), "surface": Markup(still.replace('class="wide"', 'class="still"', 1))}


def _still(plane: LossPlane, figure: Figure) -> None:
    plot_surface(plane, ax=figure.add_subplot(projection="3d"))


def _publication(landscape: Landscape) -> dict[str, Figure]:
    """Return the figures as they go to paper, by file name."""
    from matplotlib.figure import Figure

    figures = {}
    for i, s in enumerate(landscape.slices, start=1):
        figures[f"line-{i}"] = figure = Figure(figsize=(4.5, 3.2), layout="constrained")
        plot_slice(s, ax=figure.subplots())
    if landscape.plane is not None:
        figures["contours"] = figure = Figure(figsize=(4.5, 4.2), layout="constrained")
        plot_plane(landscape.plane, ax=figure.subplots())
        figures["surface"] = figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        _still(landscape.plane, figure)
    if landscape.paths:
        figures["paths"] = figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        plot_paths(landscape.paths, ax=figure.subplots())
    return figures
