"""The loss away from a point: along a direction, on a plane, each beside the quadratic model that curvature gives.

Every point is one forward pass over the data with the parameters set for as long as it takes
(`curvature.objective.shift`), as many examples at a time as is fastest. Points of a small model are looked at by a
process on each core (`analysis.run.cores`), one by one: to map a model over stacked parameters costs about as much per
point for small networks on a CPU, twice as much for convolutions, and is another function for batch statistics, masks
and hooks.

Reference: Li, Xu, Taylor, Studer and Goldstein (2018), Visualizing the loss landscape of neural nets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from analysis.landscape.point_log import PointLog
from analysis.landscape.results import Direction, LossPlane, LossSlice, Trajectory
from analysis.run.cores import answers, one_core_each
from analysis.run.preparation import fingerprint
from analysis.show.listener import Progress
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.objective.memory_format import fast_layout
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at, rows_at_once
from curvature.operators.hessian import HessianOperator

__all__ = ["evaluate_points", "loss_along", "loss_on_plane"]

_PATIENCE = 0.3  # seconds after which points go to other processes, which take a few hundredths to start


@in_whole_vectors
@full_precision
@checked
def loss_along(
    objective: Objective,
    direction: Direction,
    steps: Tensor,
    *,
    log: PointLog | None = None,
    progress: Progress | None = None,
) -> LossSlice:
    """Return L(theta + t d) at each step t, with errors over the data, and the quadratic model in t.

    The model is exact: one gradient and one Hessian product. The step 0 is the model as it stands, bit for bit.
    Cost: a forward pass a step, one gradient, one product.

    Args:
        objective: at the point of interest; it is left there, also after an error.
        direction: d.
        steps: t, (P,), finite and ascending.
        log: where points are noted as they are found, and known ones are taken from.
        progress: told after each point.

    Raises:
        InputError: for steps that are not finite and ascending, or a direction of another space.
        NonFiniteError: if the loss or gradient at the point itself is not finite.
    """
    t = _grid("steps", steps)
    d = _vector(objective, direction)
    gradient = objective.gradient()
    slope, curvature = float(gradient @ d), float(d @ (HessianOperator(objective) @ d))
    here = objective.space.current()
    with one_core_each(objective) as workers, fast_layout(objective):
        centre = loss_at(objective, here).value
        losses, stderr = evaluate_points(
            objective,
            [(s,) for s in t.tolist()],
            lambda s: (here + s * d, None),
            workers=workers,
            section=f"along {direction.name}",
            key=fingerprint(here, d, t, torch.tensor([centre])),
            log=log,
            progress=progress,
        )
    return LossSlice(
        direction=direction,
        steps=t,
        losses=losses,
        stderr=stderr,
        centre=centre,
        slope=slope,
        curvature=curvature,
        rounding=max(torch.finfo(p.dtype).eps for p in objective.space.tensors.values()),
    )


@in_whole_vectors
@full_precision
@checked
def loss_on_plane(
    objective: Objective,
    first: Direction,
    second: Direction,
    x: Tensor,
    y: Tensor,
    *,
    trajectory: Trajectory | None = None,
    log: PointLog | None = None,
    progress: Progress | None = None,
) -> LossPlane:
    """Return L(theta + x d1 + y d2) on a grid, with errors over the data, and the quadratic model in the plane.

    Cost: a forward pass a point, one gradient, two products.

    Args:
        objective: at the point of interest; it is left there, also after an error.
        first: d1.
        second: d2; it must not be parallel to d1.
        x: (P,), finite and ascending.
        y: (Q,), likewise.
        trajectory: checkpoints in this plane, to be kept with the result.
        log: where points are noted as they are found, and known ones are taken from.
        progress: told after each point.

    Raises:
        InputError: for grids that are not finite and ascending, parallel directions, or those of another space.
        NonFiniteError: if the loss or gradient at the point itself is not finite.
    """
    x, y = _grid("x", x), _grid("y", y)
    D = torch.stack([_vector(objective, first), _vector(objective, second)], dim=1)
    norms = D.norm(dim=0)
    cosine = float((D[:, 0] / norms[0]) @ (D[:, 1] / norms[1]))
    if abs(cosine) > 1 - 1e-6:
        raise InputError(f"{first.name} and {second.name} are parallel and span no plane; take two directions apart.")
    gradient, HD = D.T @ objective.gradient(), HessianOperator(objective) @ D
    hessian = D.T @ HD
    here = objective.space.current()
    with one_core_each(objective) as workers, fast_layout(objective):
        centre = loss_at(objective, here).value
        losses, stderr = evaluate_points(
            objective,
            [(s, t) for t in y.tolist() for s in x.tolist()],
            lambda s, t: (here + s * D[:, 0] + t * D[:, 1], None),
            workers=workers,
            section=f"plane of {first.name} and {second.name}",
            key=fingerprint(here, D, x, y, torch.tensor([centre])),
            log=log,
            progress=progress,
        )
    return LossPlane(
        first=first,
        second=second,
        x=x,
        y=y,
        losses=losses.view(len(y), len(x)),
        stderr=stderr.view(len(y), len(x)),
        centre=centre,
        gradient=gradient.double().cpu(),
        hessian=((hessian + hessian.T) / 2).double().cpu(),
        cosine=cosine,
        trajectory=trajectory,
    )


@full_precision
@checked
def evaluate_points(
    objective: Objective,
    steps: Sequence[tuple[float, ...]],
    point: Callable[..., tuple[Tensor, Mapping[str, Tensor] | None]],
    *,
    workers: int,
    section: str,
    key: str,
    log: PointLog | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return losses and standard errors over the data, (P,) each in float64, at `point(*step)` for every step.

    Args:
        objective: the function.
        steps: the coordinates of each point.
        point: returns parameters, (n,), and, if other than the model's own, buffers.
        workers: processes that share the points, from `one_core_each`.
        section: what the points are called in the log and in the news.
        key: fingerprint of all that determines them.
        log: where they are noted as they are found, and known ones are taken from.
        progress: told after each point.
    """
    found = {} if log is None else log.known(section, key)
    at_once = rows_at_once(objective)

    def look(i: int) -> tuple[float, float]:
        vector, buffers = point(*steps[i])
        there = loss_at(objective, vector, buffers=buffers, at_once=at_once)
        return there.value, there.stderr

    due = [i for i in range(len(steps)) if i not in found]
    if progress is not None:
        for done in range(len(found)):
            progress(section, done + 1, len(steps))
    for place, (value, error) in answers(look, due, workers, patience=_PATIENCE):
        found[due[place]] = value, error
        if log is not None:
            log.note(section, key, due[place], value, error)
        if progress is not None:
            progress(section, len(found), len(steps))
    pairs = torch.tensor([found[i] for i in range(len(steps))], dtype=torch.float64)
    return pairs[:, 0], pairs[:, 1]


def _grid(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.ndim != 1 or len(values) < 2 or not bool(values.isfinite().all()) or not bool((values.diff() > 0).all()):
        raise InputError(
            f"{name} must be two or more finite ascending numbers, got shape {tuple(values.shape)}; use torch.linspace."
        )
    return values


def _vector(objective: Objective, direction: Direction) -> Tensor:
    n = objective.num_params
    if direction.vector.shape != (n,):
        raise InputError(
            f"{direction.name} has shape {tuple(direction.vector.shape)}, the objective has {n} parameters; "
            "build directions from the objective they are used with."
        )
    return direction.vector.to(objective.device, objective.dtype)
