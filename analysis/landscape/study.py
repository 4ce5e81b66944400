"""From a task's name to its landscape: load, check, estimate, choose directions, look, and record what it rests on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

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
from analysis.landscape.plan import LandscapePlan, estimate_landscape, resolved
from analysis.landscape.point_log import PointLog, fingerprint
from analysis.landscape.results import Direction, Landscape, LandscapeCost, LossPath, Trajectory
from analysis.landscape.store import Draft, LandscapeEstimate, LandscapeRun
from analysis.run.preparation import Request, data_sha256, load, prepare
from analysis.show.listener import Listener
from analysis.show.wording import count, duration
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.objective.shift import loss_at
from curvature.operators import HessianOperator

__all__ = ["run_landscape"]

_MARGIN = 0.2  # of the box around a trajectory, on each side
_SLIMMEST = 0.5  # shorter side of that box, of the longer


def run_landscape(
    request: Request,
    plan: LandscapePlan,
    *,
    to: Path | None = None,
    trajectory: Sequence[Path] = (),
    draft: Callable[[str], Draft] | None = None,
    listener: Listener | None = None,
) -> LandscapeRun:
    """Look at the loss around the model of a task, and return the results with all that produced them.

    Args:
        request: which model, on what; its checkpoint is the point that is looked around from.
        plan: where to look, and how closely.
        to: a checkpoint of the same model, to look at the way there.
        trajectory: checkpoints in order of time, for the plane they are nearest to.
        draft: given the task's name, where points are kept as they are found; None keeps none.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or Listener()
    plan = resolved(plan, to, trajectory)
    task, objective = load(request, listener)
    with listener.doing("reading checkpoints"):
        places = [read_place(objective, path, key=request.checkpoint_key) for path in trajectory]
        end = None if to is None else read_place(objective, to, key=request.checkpoint_key)
    settings = {**request.settings, **asdict(plan)}
    if end is not None:
        settings["to"] = dict(end.record)
    if trajectory:
        settings["trajectory"] = [path.name for path in trajectory]
    kept, log = None, None
    if draft is not None:
        kept = draft(task.name)
        log = kept.begin(
            {
                "task": request.task,
                "seed": request.seed,
                "checkpoint": str(request.checkpoint),
                **settings,
                "trajectory": [dict(place.record) for place in places],
                "weights": fingerprint(*(t for t in task.model.state_dict().values() if isinstance(t, Tensor))),
                "data": data_sha256(task.train_data),
            }
        )
    ready = prepare(task, objective, request, listener)
    objective = ready.objective
    with listener.doing("timing one look"):
        estimate = estimate_landscape(objective, plan, end, len(places))
    listener.priced(_in_words(estimate), estimate.num_losses, "points")
    look = _Look(objective, plan, request.seed, kept, log, listener, estimate.num_losses + (plan.curve if end else 0))
    landscape = look.take(places, end)
    return LandscapeRun(**ready.record(request), settings=settings, estimate=estimate, landscape=landscape)


def _in_words(estimate: LandscapeEstimate) -> str:
    return (
        f"estimate: {count(estimate.num_losses)} looks at the loss, {duration(estimate.seconds_per_loss)} each, about "
        f"{count(estimate.num_matvecs)} Hessian products and {count(estimate.num_gradients)} gradients: "
        f"{duration(estimate.seconds)}"
    )


class _Look:
    """One landscape in the making: what it is made of, and what it has taken so far."""

    def __init__(
        self,
        objective: Objective,
        plan: LandscapePlan,
        seed: int,
        kept: Draft | None,
        log: PointLog | None,
        listener: Listener,
        planned: int,
    ) -> None:
        self.objective, self.plan, self.kept, self.log = objective, plan, kept, log
        self._seed = seed
        self.notes: list[str] = []
        self._listener, self._planned, self._stage = listener, planned, ""
        self._done, self._losses, self._known, self._matvecs, self._gradients = 0, 0, 0, 0, 0
        self._start = time.perf_counter()

    def take(self, places: Sequence[Place], end: Place | None) -> Landscape:
        objective, plan = self.objective, self.plan
        loss, gradient = objective.loss_and_gradient()
        if self.kept is not None:
            self.kept.confirm("loss", float(loss))
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
            self._stage = f"along {d.name}"
            slices.append(loss_along(objective, d, steps, log=self.log, tick=self._tick))
        plane = None
        if plan.plane:
            self._stage = "plane"
            plane = loss_on_plane(objective, *directions, x, y, trajectory=trajectory, log=self.log, tick=self._tick)
        self._matvecs += len(slices) + (2 if plan.plane else 0)
        self._gradients += 1 + len(slices) + plan.plane
        self._note_buffers([*places, *([end] if end is not None else [])])
        return Landscape(
            loss=float(loss),
            gradient_norm=float(gradient.norm()),
            parameter_norm=float(objective.space.current().norm()),
            num_params=objective.num_params,
            total_weight=objective.total_weight,
            num_batches=objective.num_batches or 1,
            dtype=str(objective.dtype).removeprefix("torch."),
            device=str(objective.device),
            slices=tuple(slices),
            plane=plane,
            paths=paths,
            cost=LandscapeCost(
                num_losses=self._losses,
                num_known=self._known,
                num_matvecs=self._matvecs,
                num_gradients=self._gradients,
                seconds=time.perf_counter() - self._start,
            ),
            notes=(*objective.notes, *self.notes),
        )

    # -- directions ---------------------------------------------------------------------------------------------------

    def _directions(self) -> tuple[Direction, Direction]:
        first, second = self._remembered(self._computed_directions)
        return first, second

    def _remembered(self, compute: Callable[[], tuple[Direction, ...]]) -> tuple[Direction, ...]:
        return compute() if self.kept is None else self.kept.directions(compute)

    def _computed_directions(self) -> tuple[Direction, ...]:
        plan, objective = self.plan, self.objective
        if plan.directions == "random":
            return tuple(
                random_direction(
                    objective,
                    scaling=plan.scaling,
                    scale_vectors=plan.scale_vectors,
                    generator=self._generator(i),
                    name=f"random {i}",
                )
                for i in (1, 2)
            )
        if objective.num_params < 2:
            raise InputError("one parameter is one direction: there are no two of them to look along.")
        k = 2 if plan.directions == "eigenvectors" else 1
        with self._listener.doing("finding eigenvectors"):
            sharpest, spent = eigenvector_directions(objective, k, generator=self._generator(1))
        self._matvecs += spent
        return sharpest if plan.directions == "eigenvectors" else (gradient_direction(objective), *sharpest)

    def _of_trajectory(self, places: Sequence[Place]) -> tuple[tuple[Direction, Direction], Trajectory]:
        directions, coordinates, distances, explained = trajectory_directions(
            self.objective, [place.vector for place in places]
        )
        self._stage, losses = "checkpoints", []
        for place in places:
            losses.append(loss_at(self.objective, place.vector, buffers=place.buffers).value)
            self._tick(False)
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
        self._stage = "straight path"
        paths = [loss_along_path(self.objective, start, end, t, log=self.log, tick=self._tick)]
        if not plan.curve:
            return tuple(paths), None

        def train() -> Tensor:
            self._stage = "bending the path"
            self._gradients += plan.curve
            return bend_towards(
                self.objective, start, end, num_gradients=plan.curve, generator=self._generator(3), tick=self._advance
            )

        bend = train() if self.kept is None else self.kept.tensor("bend", train)
        self._stage = "curved path"
        paths.append(
            loss_along_path(
                self.objective, start, end, t, bend=bend, num_gradients=plan.curve, log=self.log, tick=self._tick
            )
        )
        return tuple(paths), bend

    def _generator(self, place: int) -> torch.Generator:
        """Return a generator of its own for each use, so that what is not computed again leaves no gap."""
        seeds = torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(self._seed))
        return torch.Generator(device=self.objective.device).manual_seed(int(seeds[place]))

    # -- books --------------------------------------------------------------------------------------------------------

    def _tick(self, known: bool) -> None:
        self._losses += 1
        self._known += known
        self._advance()

    def _advance(self) -> None:
        self._done += 1
        self._listener.advanced(self._stage, self._done, max(self._planned, self._done))

    def _note_buffers(self, places: Sequence[Place]) -> None:
        own = present_place(self.objective).buffers
        moved = [p.name for p in places if any(not torch.equal(p.buffers[n].to(t), t) for n, t in own.items())]
        if moved:
            self.notes.append(
                f"Buffers (statistics of batch normalisation) of {', '.join(moved)} differ from the model's: paths go "
                "from one to the other, lines and the plane keep the model's."
            )
