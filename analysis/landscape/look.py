"""Looking around: directions are chosen, then lines, the plane and paths looked at, point by point."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from analysis.landscape.directions import (
    custom_direction,
    direction_to,
    eigenvector_directions,
    gradient_direction,
    random_direction,
    trajectory_directions,
)
from analysis.landscape.measure import loss_along, loss_on_plane
from analysis.landscape.paths import Place, bend_towards, loss_along_path, present_place, read_place
from analysis.landscape.plan import LandscapePlan
from analysis.landscape.point_log import PointLog
from analysis.landscape.results import Direction, Landscape, LandscapeCost, LossPath, Trajectory
from analysis.records.plan import from_plan
from analysis.run.draft import POINTS, Draft
from analysis.show.listener import Progress
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.generators import spawn
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at
from curvature.operators.hessian import HessianOperator

__all__ = ["look_around"]

_MARGIN = 0.2  # of the box around a trajectory, on each side
_SLIMMEST = 0.5  # shorter side of that box, of the longer


@in_whole_vectors
@from_plan(LandscapePlan)
@full_precision
@checked
def look_around(
    objective: Objective,
    plan: LandscapePlan,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> Landscape:
    """Look at the loss around the objective's point: along directions, on a plane, on paths to a checkpoint.

    Cost: see `LandscapePlan.price`.

    Args:
        objective: the loss at the point that is looked around from; it is left there.
        plan: settings; or pass them one by one.
        generator: source of random directions and of start vectors, on the objective's device.
        progress: told after each point.
        draft: where points are kept as they are found, and known ones are taken from.

    Raises:
        CheckpointError: if a checkpoint cannot be read or does not fit.
        InputError: if directions or checkpoints do not span a plane.
        NonFiniteError: if the loss or gradient at the point itself is not finite.
    """
    places = [read_place(objective, path, key=plan.checkpoint_key) for path in plan.trajectory]
    end = None if plan.to is None else read_place(objective, plan.to, key=plan.checkpoint_key)
    return _Look(objective, plan, generator, progress, draft).take(places, end)


class _Look:
    """One landscape in the making: what it is made of, and what it has taken so far."""

    def __init__(
        self,
        objective: Objective,
        plan: LandscapePlan,
        generator: torch.Generator,
        progress: Progress | None,
        draft: Draft | None,
    ) -> None:
        self.objective, self.plan, self.draft = objective, plan, draft
        self.log = None if draft is None else PointLog(draft.path / POINTS)
        self._seeds = [stream.initial_seed() for stream in spawn(generator, 4)]
        self.notes: list[str] = []
        self._progress = progress
        self._done, self._bent, self._matvecs, self._gradients = 0, 0, 0, 0
        self._start = time.perf_counter()

    def take(self, places: Sequence[Place], end: Place | None) -> Landscape:
        objective, plan = self.objective, self.plan
        loss, gradient = objective.loss_and_gradient()
        if self.draft is not None:
            self.draft.confirm("loss", float(loss))
        paths, bend = self._paths(end)
        trajectory: Trajectory | None = None
        if plan.directions == "pca":
            directions, trajectory = self._of_trajectory(places)
        elif plan.directions == "path":
            assert end is not None
            assert bend is not None
            directions, trajectory = self._of_path(end, bend, paths[-1])
        else:
            directions = self._directions()
        x, y = self._grids(directions, trajectory)
        slices = []
        for d, steps in zip(directions, (x, y), strict=True):
            slices.append(loss_along(objective, d, steps, log=self.log, progress=self._tell))
        plane = None
        if plan.plane:
            plane = loss_on_plane(
                objective, *directions, x, y, trajectory=trajectory, log=self.log, progress=self._tell
            )
        self._matvecs += len(slices) + (2 if plan.plane else 0)
        self._gradients += 1 + len(slices) + plan.plane
        self._note_buffers([*places, *([end] if end is not None else [])])
        return Landscape(
            loss=float(loss),
            gradient_norm=float(gradient.norm()),
            parameter_norm=float(objective.space.current().norm()),
            num_params=objective.num_params,
            total_weight=objective.total_weight,
            num_batches=_num_batches(objective),
            dtype=str(objective.dtype).removeprefix("torch."),
            device=str(objective.device),
            slices=tuple(slices),
            plane=plane,
            paths=paths,
            cost=LandscapeCost(
                num_losses=self._done - self._bent,
                num_known=0 if self.log is None else self.log.num_known,
                num_matvecs=self._matvecs,
                num_gradients=self._gradients,
                seconds=time.perf_counter() - self._start,
            ),
            notes=(*objective.notes, *self.notes),
        )

    # -- directions ---------------------------------------------------------------------------------------------------

    def _directions(self) -> tuple[Direction, Direction]:
        """Return both directions; those of a draft, of which a solver would find others at the last bits."""

        def compute() -> dict[str, Tensor]:
            found = enumerate(self._computed_directions())
            return {f"{i} {d.kind} {d.scaling} {d.name}": d.vector for i, d in found}

        kept = compute() if self.draft is None else self.draft.tensors("directions", compute)
        if self.plan.directions == "eigenvectors":
            _ = HessianOperator(self.objective).product_noise  # noted, whoever computed them
        first, second = (
            Direction(name=name, kind=kind, scaling=scaling, norm=float(vector.norm()), vector=vector)
            for (_, kind, scaling, name), vector in ((key.split(" ", 3), vector) for key, vector in kept.items())
        )
        return first, second

    def _computed_directions(self) -> tuple[Direction, ...]:
        plan, objective = self.plan, self.objective
        if plan.directions == "random":
            return tuple(
                random_direction(
                    objective,
                    scaling=plan.scaling,
                    scale_vectors=plan.scale_biases,
                    generator=self._generator(i),
                    name=f"random {i}",
                )
                for i in (1, 2)
            )
        if objective.num_params < 2:
            raise InputError("one parameter is one direction: there are no two of them to look along.")
        k = 2 if plan.directions == "eigenvectors" else 1
        sharpest, spent = eigenvector_directions(objective, k, generator=self._generator(1))
        self._matvecs += spent
        return sharpest if plan.directions == "eigenvectors" else (gradient_direction(objective), *sharpest)

    def _of_trajectory(self, places: Sequence[Place]) -> tuple[tuple[Direction, Direction], Trajectory]:
        directions, coordinates, distances, explained = trajectory_directions(
            self.objective, [place.vector for place in places]
        )
        losses = []
        for place in places:
            losses.append(loss_at(self.objective, place.vector, buffers=place.buffers).value)
            self._tell("checkpoints", len(losses), len(places))
        found = Trajectory(
            names=tuple(place.name for place in places),
            coordinates=coordinates,
            distances=distances,
            losses=torch.tensor(losses, dtype=torch.float64),
            explained=explained,
        )
        return directions, found

    def _of_path(self, end: Place, bend: Tensor, curve: LossPath) -> tuple[tuple[Direction, Direction], Trajectory]:
        """Return the plane of both ends and the bend, as an orthonormal pair, and the curve in it."""
        here = self.objective.space.current()
        first = direction_to(self.objective, end.vector, name=f"towards {end.name}", unit=True)
        b = bend.to(here) - here
        across = b - (b @ first.vector) * first.vector
        across = across - (across @ first.vector) * first.vector  # twice, for digits that cancelled
        second = custom_direction(self.objective, across / across.norm(), name="towards the bend")
        second = replace(second, kind="checkpoint", scaling="unit")
        t = curve.positions[:, None]
        at_bend = torch.tensor([[float(b @ first.vector), float(across.norm())]], dtype=torch.float64)
        at_end = torch.tensor([[float((end.vector.to(here) - here).norm()), 0.0]], dtype=torch.float64)
        coordinates = 2 * t * (1 - t) * at_bend + t**2 * at_end
        squares = coordinates.square().sum(dim=0)
        share = float(squares[0] / squares.sum())
        return (first, second), Trajectory(
            names=(curve.start, *(f"t = {p:.2f}" for p in curve.positions.tolist()[1:-1]), curve.end),
            coordinates=coordinates,
            distances=torch.zeros(len(coordinates), dtype=torch.float64),
            losses=curve.losses,
            explained=(share, 1 - share),
        )

    def _grids(self, directions: tuple[Direction, Direction], trajectory: Trajectory | None) -> tuple[Tensor, Tensor]:
        """Return the steps along both directions."""
        if trajectory is not None and self.plan.radius is None:
            box = torch.cat([trajectory.coordinates, torch.zeros(1, 2, dtype=trajectory.coordinates.dtype)])
            low, high = box.min(dim=0).values, box.max(dim=0).values
            half = (0.5 + _MARGIN) * (high - low)
            half = half.clamp_min(_SLIMMEST * float(half.max()))
            ends = torch.stack([(low + high) / 2 - half, (low + high) / 2 + half]).double()
            x, y = (torch.linspace(float(a), float(b), self.plan.points, dtype=torch.float64) for a, b in ends.T)
            return x, y
        radius = self.plan.radius or self._radius(directions)
        last = self.plan.points - 1  # steps in which 0 is 0, where their number is odd
        steps = radius * torch.arange(-last, last + 1, 2, dtype=torch.float64) / last
        return steps, steps

    def _radius(self, directions: tuple[Direction, Direction]) -> float:
        """Return 1 where weights set the scale; else where the model predicts a rise that shows: see `--radius`."""
        if all(d.scaling in ("filter", "layer") for d in directions):
            return 1.0
        here = self.objective.space.current()
        D = torch.stack([d.vector.to(here) for d in directions], dim=1)
        curvatures = (D * (HessianOperator(self.objective) @ D)).sum(dim=0).abs().tolist()
        self._matvecs += 2
        loss = loss_at(self.objective, here).value
        rise = max(abs(loss), min(1.0, 10 * abs(loss)))
        bound = max(float(here.norm()), 1e-3) / max(d.norm for d in directions)
        reach = [math.sqrt(2 * rise / c) for c in curvatures if c > 0 and rise > 0]
        return float(f"{min(bound, *reach, bound):.2g}") if reach else bound

    # -- paths --------------------------------------------------------------------------------------------------------

    def _paths(self, end: Place | None) -> tuple[tuple[LossPath, ...], Tensor | None]:
        if end is None:
            return (), None
        start, plan = present_place(self.objective), self.plan
        t = torch.linspace(0, 1, plan.points, dtype=torch.float64)
        paths = [loss_along_path(self.objective, start, end, t, log=self.log, progress=self._tell)]
        if not plan.curve:
            return tuple(paths), None

        def train() -> dict[str, Tensor]:
            self._gradients, self._bent = self._gradients + plan.curve, plan.curve
            settings: dict[str, Any] = {"num_gradients": plan.curve, "generator": self._generator(3)}
            return {"bend": bend_towards(self.objective, start, end, progress=self._tell, **settings)}

        bend = (train() if self.draft is None else self.draft.tensors("bend", train))["bend"].to(start.vector)
        settings: dict[str, Any] = {"num_gradients": plan.curve, "log": self.log, "progress": self._tell}
        paths.append(loss_along_path(self.objective, start, end, t, bend=bend, **settings))
        return tuple(paths), bend

    def _generator(self, place: int) -> torch.Generator:
        """Return a generator of its own for each use, so that what is not computed again leaves no gap."""
        return torch.Generator(device=self.objective.device).manual_seed(self._seeds[place])

    # -- books --------------------------------------------------------------------------------------------------------

    def _tell(self, stage: str, done: int, total: int) -> None:
        """Count a point, or a step of bending, and tell how far the whole has come."""
        del done, total
        self._done += 1
        if self._progress is not None:
            self._progress(stage, self._done, max(self.plan.num_losses + self.plan.curve, self._done))

    def _note_buffers(self, places: Sequence[Place]) -> None:
        own = present_place(self.objective).buffers
        moved = [p.name for p in places if any(not torch.equal(p.buffers[n].to(t), t) for n, t in own.items())]
        if moved:
            self.notes.append(
                f"Buffers (statistics of batch normalisation) of {', '.join(moved)} differ from the model's: paths go "
                "from one to the other, lines and the plane keep the model's."
            )
        for place in places:
            if place.others:
                named = ", ".join(place.others[:3]) + (", ..." if len(place.others) > 3 else "")
                self.notes.append(
                    f"{place.name} differs from the model in parameters that were not chosen ({named}), which stay the "
                    "model's: its loss here is not that of the checkpoint."
                )


def _num_batches(objective: Objective) -> int:
    """Return how many batches the data have, those of other ranks among them."""
    own = objective.num_batches or 0
    if objective.ranks is not None:
        own = int(objective.ranks.sum(torch.zeros(0, device=objective.device), float(own))[1])
    return max(own, 1)
