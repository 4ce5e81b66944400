"""What `curvature landscape` shows on a terminal."""

from __future__ import annotations

import math

from analysis.landscape.results import Landscape, LossPath, LossSlice
from analysis.show import wording
from analysis.show.screen import Screen, new_table

__all__ = ["show_landscape"]


def show_landscape(screen: Screen, landscape: Landscape) -> None:
    """Print the slices with their quadratic models, the paths, and what it cost."""
    number, count = wording.number, wording.count
    screen.say(
        f"\nloss {number(landscape.loss)}, gradient norm {number(landscape.gradient_norm, 3)}, "
        f"parameter norm {number(landscape.parameter_norm, 3)}"
    )
    columns = (
        "direction",
        "|d|",
        "slope g'd",
        "curvature d'Hd",
        "model holds to 10 %",
        "to 50 %",
        "lowest loss",
        "at",
    )
    table = new_table("\nLoss along directions, with the quadratic model L + t g'd + t² d'Hd / 2", *columns)
    for s in landscape.slices:
        table.add_row(s.direction.name, *(number(v, 3) for v in (s.direction.norm, s.slope, s.curvature)), *_ends(s))
    screen.say(table)
    if landscape.plane is not None:
        p = landscape.plane
        low, high = p.losses.nan_to_num(nan=math.inf).min(), p.losses.nan_to_num(nan=-math.inf).max()
        text = f"\nplane: {len(p.x)} x {len(p.y)} points, loss from {number(float(low))} to {number(float(high))}"
        if p.trajectory is not None:
            first, second = (100 * share for share in p.trajectory.explained)
            text += f"; the two directions hold {first:.0f} % and {second:.0f} % of the way"
        screen.say(text)
    if landscape.paths:
        table = new_table("\nPaths", "path", "from", "to", "barrier", "at", "highest loss", "length")
        for path in landscape.paths:
            table.add_row(*_path(path))
        screen.say(table)
    cost = landscape.cost
    known = f" ({count(cost.num_known)} from before)" if cost.num_known else ""
    screen.say(
        f"spent: {count(cost.num_losses)} looks{known}, {count(cost.num_matvecs)} Hessian products, "
        f"{count(cost.num_gradients)} gradients, {wording.duration(cost.seconds)}"
    )


def _ends(s: LossSlice) -> tuple[str, str, str, str]:
    losses = s.losses.nan_to_num(nan=math.inf)
    place = int(losses.argmin())
    radii = [s.quadratic_radius(deviation) for deviation in (0.1, 0.5)]
    beyond = wording.number(float(s.steps.abs().max()), 3)
    first, second = (wording.number(r, 3) if math.isfinite(r) else f"> {beyond}" for r in radii)
    return first, second, wording.number(float(losses[place])), wording.number(float(s.steps[place]), 2)


def _path(path: LossPath) -> tuple[str, ...]:
    number = wording.number
    highest = number(float(path.losses.max()))
    at = number(path.barrier_position, 2) if math.isfinite(path.barrier) else ""
    return path.kind, path.start, path.end, number(path.barrier, 3), at, highest, number(path.length, 3)
