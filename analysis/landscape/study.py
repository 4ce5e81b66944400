"""`curvature landscape`: the loss around a point beside its quadratic model, and what it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from analysis.landscape.figures import color_stops, is_logarithmic, plot_paths, plot_plane, plot_slice, plot_surface
from analysis.landscape.look import look_around
from analysis.landscape.plan import LandscapePlan
from analysis.landscape.results import Landscape, LossPath, LossPlane, LossSlice, Trajectory
from analysis.run.study import Study, StudyRun
from analysis.show.drawing import to_numpy
from analysis.show.report import Card, Figure, Finding, Report, Section, Surface, Table
from analysis.show.wording import count, number
from curvature.results.record import to_plain

__all__ = ["STUDY", "LandscapeRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LandscapeRun(StudyRun):
    """One landscape, with what produced it."""

    kind: ClassVar[str] = "landscape"
    result: ClassVar[str] = "landscape"

    landscape: Landscape
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        found, cost = self.landscape, self.landscape.cost
        known = f" ({count(cost.num_known)} from before)" if cost.num_known else ""
        spent = f"{count(cost.num_losses)} losses{known}, {count(cost.num_matvecs)} Hessian products"
        return Report(
            title="Loss landscape",
            facts=(spent, f"{count(cost.num_gradients)} gradients"),
            cards=_cards(found),
            findings=tuple(_findings(found)),
            sections=_sections(found, bool(self.settings["directions"] == "pca")),
            terms=tuple(_terms(found, moved=bool(self.settings["scale_biases"]))),
            method=(
                f"Every point is the loss on all {count(found.total_weight)} terms, with the parameters set for one "
                "forward pass and restored bit for bit; buffers and random states do not change."
            ),
            notes=found.notes,
        )


def _cards(found: Landscape) -> tuple[Card, ...]:
    cards = [Card(label="Loss", value=number(found.loss), hint=f"mean over {count(found.total_weight)} terms")]
    if not found.paths:
        hint = "zero at a stationary point"
        cards.append(Card(label="Gradient norm", value=number(found.gradient_norm), hint=hint))
    for s in found.slices:
        label, hint = f"Quadratic model, {s.direction.name}", "up to where it predicts the loss to 10 %"
        cards.append(Card(label=label, value=_radii(s)[0], error="steps", hint=hint))
    for path in found.paths[-1:]:
        straight = number(found.paths[0].barrier, 3)
        hint = f"{straight} on the straight path" if path.kind == "curved" else f"on the way to {path.end}"
        cards.append(Card(label=f"Barrier, {path.kind}", value=number(path.barrier, 3), hint=hint))
    return tuple(cards)


def _findings(found: Landscape) -> list[Finding]:
    radii = [s.quadratic_radius(0.1) for s in found.slices]
    parts = [
        f"{_radii(s)[0]} steps along {s.direction.name} (a distance of {number(r * s.direction.norm, 2)})"
        if math.isfinite(r)
        else f"the end of the line along {s.direction.name}"
        for s, r in zip(found.slices, radii, strict=True)
    ]
    text = f"It predicts the change of the loss to 10 % up to {' and up to '.join(parts)}."
    answers = [Finding("How far does the quadratic model hold?", text)]
    places = [(s.losses, s.direction.name) for s in found.slices]
    places += [] if found.plane is None else [(found.plane.losses, "the plane")]
    least, where = min((float(losses.nan_to_num(nan=math.inf).min()), name) for losses, name in places)
    if least < found.loss * (1 - 1e-4) - 1e-12:
        text = f"No: {where} has a point of loss {number(least)}, {number(100 * (1 - least / found.loss), 2)} % lower."
    else:
        text = f"Yes: no evaluated point lies below its loss of {number(found.loss)}."
    answers.append(Finding("Is the model the lowest point found?", text))
    bends = " and ".join(s.direction.name for s in found.slices if s.curvature < 0)
    text = "Yes, along every direction that was evaluated."
    if bends:
        text = f"No: it is negative along {bends}."
    answers.append(Finding("Is the curvature positive?", text))
    if found.paths:
        straight = found.paths[0]
        text = f"The straight path rises by {number(straight.barrier, 3)} above the line between the ends"
        text += f", at t = {number(straight.barrier_position, 2)}" if straight.barrier > 0 else ""
        for curved in found.paths[1:]:
            longer = number(100 * (curved.length / straight.length - 1), 2)
            text += f"; the curved one by {number(curved.barrier, 3)}, and is {longer} % longer"
        answers.append(Finding(f"Is there a barrier to {straight.end}?", text + "."))
    return answers


def _radii(s: LossSlice) -> tuple[str, str]:
    """Return the radii to 10 % and to 50 % as text, "> R" where the model holds as far as was looked."""
    beyond = f"> {number(float(s.steps.abs().max()), 3)}"
    radii = (s.quadratic_radius(deviation) for deviation in (0.1, 0.5))
    first, second = (number(r, 3) if math.isfinite(r) else beyond for r in radii)
    return first, second


# -- figures and tables -----------------------------------------------------------------------------------------------


def _sections(found: Landscape, pca: bool) -> tuple[Section, ...]:
    sections = [] if found.plane is None else [_plane(found.plane, pca)]
    sections.append(_lines(found))
    if found.paths:
        sections.append(_paths(found.paths))
    return tuple(sections)


def _plane(plane: LossPlane, pca: bool) -> Section:
    aspect = float((plane.y[-1] - plane.y[0]) / (plane.x[-1] - plane.x[0]))
    path = ""
    if plane.trajectory is not None:
        path = " The line is the curved path, which lies in this plane."
        if pca:
            path = (
                " The line joins the feet of the checkpoints, which lie off the plane by the distances in the table "
                "below: contours hold on the plane, not at the checkpoints."
            )
    angle = "The two directions are at right angles."
    if abs(plane.cosine) >= 1e-6:
        cosine = number(plane.cosine, 2)
        angle = f"The cosine between the two directions is {cosine}; the picture draws them at a right angle."

    def draw(axes: list[Any], colors: object) -> None:
        del colors  # heights have colours of their own
        plot_plane(plane, ax=axes[0])
        plot_plane(plane, show="model", ax=axes[1])

    figure = Figure(
        name="contours",
        label=f"Contours of the loss and of its quadratic model over {plane.first.name} and {plane.second.name}.",
        caption="Contours of the loss (left, or above) and of its quadratic model at the star (right, or below), at "
        f"the same levels.{path} {angle}",
        draw=draw,
        height=min(6.0, max(2.2, 0.8 + 2.95 * aspect)),
        narrow_height=min(9.0, max(3.4, 1.6 + 5.4 * aspect)),
        panels=2,
    )
    tables = (_checkpoints(plane.trajectory),) if plane.trajectory is not None and pca else ()
    return Section(title="The plane", surface=_surface(plane), figures=(figure,), tables=tables)


def _checkpoints(t: Trajectory) -> Table:
    columns = (*t.coordinates.T.tolist(), t.distances.tolist(), t.losses.tolist())
    shares = [number(100 * share, 3) for share in t.explained]
    return Table(
        caption=f"The checkpoints. The two directions hold {shares[0]} % and {shares[1]} % of the sum of squared "
        "distances from the model.",
        columns=("checkpoint", "first", "second", "distance from the plane", "loss"),
        rows=tuple(
            (name, *(number(v, 3) for v in row[:3]), number(row[3]))
            for name, *row in zip(t.names, *columns, strict=True)
        ),
    )


def _surface(plane: LossPlane) -> Surface:
    def rounded(values: Any) -> Any:
        if isinstance(values, list):
            return [rounded(v) for v in values]
        return None if values is None else float(f"{values:.5g}")

    t, finite = plane.trajectory, plane.losses[plane.losses.isfinite()]
    data = {
        "x": plane.x.tolist(),
        "y": plane.y.tolist(),
        "loss": rounded(to_plain(plane.losses)),
        "model": rounded(to_plain(plane.model())),
        "centre": plane.centre,
        "names": [plane.first.name, plane.second.name],
        "trajectory": [] if t is None else [dict(zip("xy", t.coordinates.T.tolist(), strict=True))],
        "logarithmic": is_logarithmic(to_numpy(plane.losses)),
        "positive": bool((plane.losses.nan_to_num(nan=1.0) > 0).all()),
        "colors": color_stops(),
        "hint": "Point at the surface to read values.",
    }
    low, high = number(float(finite.min())), number(float(finite.max()))
    label = (
        f"Surface of the loss over {plane.first.name} and {plane.second.name}, from {low} to {high}; "
        f"{number(plane.centre)} at the model."
    )
    return Surface(data=data, label=label, draw=lambda ax: plot_surface(plane, ax=ax))


def _lines(found: Landscape) -> Section:
    names = " and ".join(s.direction.name for s in found.slices)
    band = ""
    if found.num_batches > 1:
        pieces = count(found.num_batches)
        band = f" The coloured band is one standard error over data of the same size, from {pieces} pieces of the data."

    def draw(axes: list[Any], colors: Any) -> None:
        for s, ax in zip(found.slices, axes, strict=True):
            plot_slice(s, ax=ax, colors=colors)

    figure = Figure(
        name="lines",
        label=f"Loss along {names}, each with its quadratic model; the table below has the numbers.",
        caption="The loss along each direction (solid) and its quadratic model at the model's point (dashed), from one "
        "exact gradient and one exact Hessian product. In the grey strip the model predicts the change of the loss to "
        f"10 %.{band}",
        draw=draw,
        height=3.0,
        panels=len(found.slices),
    )
    table = Table(
        caption="Directions d and the model L + t g·d + ½ t² d·Hd. A radius is in steps; times |d| it is a distance "
        "between parameters.",
        columns=(
            "direction",
            "scaled by",
            "|d|",
            "slope g·d",
            "curvature d·Hd",
            "holds to 10 %",
            "to 50 %",
            "lowest loss",
            "at step",
        ),
        rows=tuple(_row(s) for s in found.slices),
        signed=(4,),
    )
    return Section(title="Along directions", figures=(figure,), tables=(table,))


def _row(s: LossSlice) -> tuple[str, ...]:
    losses = s.losses.nan_to_num(nan=math.inf)
    place, d = int(losses.argmin()), s.direction
    model = (number(v, 3) for v in (d.norm, s.slope, s.curvature))
    return (d.name, d.scaling, *model, *_radii(s), number(float(losses[place])), number(float(s.steps[place]), 2))


def _paths(paths: tuple[LossPath, ...]) -> Section:
    start, end = paths[0].start, paths[0].end
    told = ", ".join(f"{path.kind} with a barrier of {number(path.barrier, 3)}" for path in paths)
    how = " no other path was asked for"
    if len(paths) > 1:
        how = f" along a Bezier curve whose bend was trained with {count(paths[1].num_gradients)} gradients"
    figure = Figure(
        name="paths",
        label=f"Loss along paths: {told}.",
        caption=f"The loss on the way from {start} to {end}: straight, and{how}. The barrier is the largest height "
        "above the dotted line between the ends.",
        draw=lambda ax, colors: plot_paths(paths, ax=ax, colors=colors),
    )
    table = Table(
        caption=f"Paths from {start} to {end}.",
        columns=("path", "barrier", "at", "highest loss", "length"),
        rows=tuple(
            (
                path.kind,
                number(path.barrier, 3),
                number(path.barrier_position, 2) if math.isfinite(path.barrier) else "",
                number(float(path.losses.max())),
                number(path.length, 3),
            )
            for path in paths
        ),
    )
    return Section(title=f"To {end}", figures=(figure,), tables=(table,))


def _terms(found: Landscape, *, moved: bool) -> list[tuple[str, str]]:
    terms = [
        (
            "A picture of few dimensions",
            f"{count(found.num_params)} parameters are looked at along one or two directions. What is not seen here "
            "may be anywhere else: most random directions look alike, and say little about the sharpest.",
        )
    ]
    if "filter" in {s.direction.scaling for s in found.slices}:
        meaning = (
            "Each filter (the incoming weights of one unit) of a random direction has the norm of the same filter of "
            f"the model; biases and normalisation parameters {'move likewise' if moved else 'stay where they are'}. A "
            "step of 1 changes every filter by as much as it is long. Rescaling layers of a ReLU network, which does "
            "not change what it computes, does not change the curve either (Li et al. 2018)."
        )
        terms.append(("Filter normalisation", meaning))
    meaning = (
        "L + t g·d + ½ t² d·Hd with the exact gradient g and Hessian H. It holds to 10 % at t if it is off by at most "
        "a tenth of |t g·d| + ½ t² |d·Hd|, the change it predicts; the radius is the largest up to which it holds at "
        "every step."
    )
    terms.append(("Quadratic model", meaning))
    if found.paths:
        positions = len(found.paths[0].positions)
        terms.append(("Barrier", f"max L(t) − ((1 − t) L(0) + t L(1)) along the path, over {positions} positions."))
    if found.num_batches > 1:
        meaning = (
            "One standard error of the loss over data of the same size, from its spread over pieces of the data. "
            "Neighbouring points share the data, so the shape of a curve is known better than its height."
        )
        terms.append(("± other data", meaning))
    return terms


STUDY = Study(
    record=LandscapeRun,
    plan=LandscapePlan,
    measure=look_around,
    price=lambda objective, plan: plan.price(objective),
    groups=True,
    num_vectors=lambda _: 2,
    resumable=True,
)
