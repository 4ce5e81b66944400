"""The loss on a path from one set of parameters to another: straight, or along a curve that was trained to be low.

A straight path between two minima usually crosses a barrier; a quadratic Bezier curve through one more point often
finds a way around it.

Reference: Garipov, Izmailov, Podoprikhin, Vetrov and Wilson (2018), Loss surfaces, mode connectivity and fast
ensembling of DNNs, arXiv 1802.10026.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from analysis.landscape.measure import evaluate_points
from analysis.landscape.point_log import PointLog
from analysis.landscape.results import LossPath
from analysis.run.cores import one_core_each
from analysis.run.preparation import fingerprint
from analysis.show.listener import Progress
from analysis.tasks.checkpoint import read_checkpoint
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import CheckpointError, InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import gradient_at

__all__ = ["Place", "bend_towards", "loss_along_path", "present_place", "read_place"]

_GOLDEN = (math.sqrt(5) - 1) / 2
_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's


@dataclass(frozen=True, kw_only=True)
class Place:
    """A point of the parameters' space, with the buffers that go with it (statistics of batch normalisation)."""

    name: str
    """For people."""
    vector: Tensor
    """(n,), in the order of the objective's space."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Floating-point buffers by name."""
    record: Mapping[str, str] = field(default_factory=dict)
    """File name, digest and key of the checkpoint it was read from."""
    others: tuple[str, ...] = ()
    """Parameters that were not chosen, and are others there than in the model."""


@in_whole_vectors
@checked
def present_place(objective: Objective, *, name: str = "the model") -> Place:
    """Return the point where the objective is."""
    return Place(name=name, vector=objective.space.current(), buffers=_buffers(dict(objective.model.named_buffers())))


@in_whole_vectors
@checked
def read_place(objective: Objective, path: Path, *, key: str | None = None) -> Place:
    """Return the point that a checkpoint holds, `key` says where if at several places; the model is left as it is.

    Raises:
        CheckpointError: if the file is missing, unreadable, does not fit, or lacks a chosen parameter.
    """
    checkpoint = read_checkpoint(path, objective.model, key=key)
    state = checkpoint.state
    missing = [name for name in objective.space.names if name not in state]
    if missing:
        raise CheckpointError(f"the checkpoint {path} holds no {missing[0]!r}, which is among the chosen parameters.")
    vector = objective.space.to_flat({name: state[name] for name in objective.space.names}).to(objective.device)
    present: dict[str, Tensor] = dict(objective.model.named_buffers())  # what is not saved, stays as it is
    buffers = _buffers({n: state.get(n, t) for n, t in present.items()})
    held = [(n, p) for n, p in objective.model.named_parameters() if n in state and n not in objective.space.names]
    others = tuple(n for n, p in held if not torch.equal(state[n].to(p), p))
    return Place(name=path.stem, vector=vector, buffers=buffers, record=checkpoint.record, others=others)


@in_whole_vectors
@full_precision
@checked
def loss_along_path(
    objective: Objective,
    start: Place,
    end: Place,
    positions: Tensor,
    *,
    bend: Tensor | None = None,
    num_gradients: int = 0,
    log: PointLog | None = None,
    progress: Progress | None = None,
) -> LossPath:
    """Return L along (1 - t) a + t b, or along the Bezier curve (1 - t)^2 a + 2 t (1 - t) c + t^2 b through a bend c.

    Floating-point buffers go straight from those of the start to those of the end, so that both ends are the models
    that were saved. Cost: a forward pass a position.

    Args:
        objective: the function; it stays at its own point.
        start: a, at t = 0.
        end: b, at t = 1.
        positions: t, (P,), ascending from 0 to 1.
        bend: c, (n,); None for a straight path.
        num_gradients: what the bend took, for the record.
        log: where points are noted as they are found, and known ones are taken from.
        progress: told after each point.

    Raises:
        InputError: for positions that do not ascend from 0 to 1, or places of another space.
    """
    t = torch.as_tensor(positions, dtype=torch.float64).cpu()
    if t.ndim != 1 or len(t) < 3 or t[0] != 0 or t[-1] != 1 or not bool((t.diff() > 0).all()):
        raise InputError(f"positions must be three or more, ascending from 0 to 1, got {t.tolist()[:5]}.")
    _check_places(objective, start, end)
    a, b = (place.vector.to(objective.device, objective.dtype) for place in (start, end))
    middle = (a + b) / 2 if bend is None else bend.to(a)
    kind = "straight" if bend is None else "curved"
    key = fingerprint(a, middle, b, t, *start.buffers.values(), *end.buffers.values())
    with one_core_each(objective) as workers:
        losses, stderr = evaluate_points(
            objective,
            [(s,) for s in t.tolist()],
            lambda s: (_curve(a, middle, b, s, bend is not None), _mixed(start, end, s)),
            workers=workers,
            section=f"{kind} path",
            key=key,
            log=log,
            progress=progress,
        )
    return LossPath(
        kind=kind,
        start=start.name,
        end=end.name,
        positions=t,
        losses=losses,
        stderr=stderr,
        length=_length(a, middle, b),
        num_gradients=num_gradients,
    )


@in_whole_vectors
@full_precision
@checked
def bend_towards(
    objective: Objective,
    start: Place,
    end: Place,
    *,
    num_gradients: int,
    lr: float = 0.1,
    generator: AnyGenerator,
    progress: Progress | None = None,
) -> Tensor:
    """Return the bend c (n,) of a Bezier curve along which the mean loss, integral_0^1 L(phi(t)) dt, was made small.

    From the middle of the straight path, Adam with the gradient 2 t (1 - t) g(phi(t)) of one position a step, the step
    size falling to 0 along half a cosine. Positions are spread evenly: multiples of the golden ratio from a random
    start, which leaves less noise than independent ones. The paper trains with batches and SGD.

    Args:
        objective: the function; it stays at its own point.
        start: a.
        end: b.
        num_gradients: steps, each a gradient over all data.
        lr: step size, in units of the root mean square of the entries of b - a.
        generator: for the start of the positions, on the objective's device, or a seed.
        progress: told after each step.

    Raises:
        InputError: for settings out of range, ends that are the same, or places of another space.
        NonFiniteError: if the loss is not finite on the way; take a smaller `lr`.
    """
    if num_gradients < 1 or not lr > 0:
        raise InputError(f"num_gradients must be at least 1 and lr positive, got {num_gradients} and {lr}.")
    _check_places(objective, start, end)
    a, b = (place.vector.to(objective.device, objective.dtype) for place in (start, end))
    scale = float((b - a).square().mean().sqrt())
    if scale == 0:
        raise InputError("start and end are the same parameters; there is no path between them.")
    bend = (a + b) / 2
    mean, square = torch.zeros_like(bend), torch.zeros_like(bend)
    offset = float(torch.rand((), generator=as_generator(generator, a.device), device=a.device))
    for step in range(1, num_gradients + 1):
        t = (offset + step * _GOLDEN) % 1
        _, g = gradient_at(objective, _curve(a, bend, b, t, True), buffers=_mixed(start, end, t))
        g = 2 * t * (1 - t) * g
        mean = torch.lerp(g, mean, _BETAS[0])
        square = torch.lerp(g.square(), square, _BETAS[1])
        size = lr * scale * (1 + math.cos(math.pi * (step - 1) / num_gradients)) / 2
        unbiased = (square / (1 - _BETAS[1] ** step)).sqrt()
        bend = bend - size * mean / (1 - _BETAS[0] ** step) / (unbiased + _EPS * unbiased.max())
        if progress is not None:
            progress("bending the path", step, num_gradients)
    return bend


def _curve(a: Tensor, c: Tensor, b: Tensor, t: float, curved: bool) -> Tensor:
    if t in (0.0, 1.0):  # the ends themselves, without rounding
        return a if t == 0 else b
    return (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b if curved else torch.lerp(a, b, t)


def _length(a: Tensor, c: Tensor, b: Tensor) -> float:
    """Return the length of the curve, integral |2 (1 - t) (c - a) + 2 t (b - c)| dt, from three inner products."""
    p, q = c - a, b - c
    pp, pq, qq = float(p @ p), float(p @ q), float(q @ q)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    speed = 2 * ((1 - t) ** 2 * pp + 2 * t * (1 - t) * pq + t**2 * qq).clamp_min(0).sqrt()
    return float(torch.trapezoid(speed, t))


def _mixed(start: Place, end: Place, t: float) -> dict[str, Tensor]:
    if t in (0.0, 1.0):
        return dict((start if t == 0 else end).buffers)
    return {name: torch.lerp(first, end.buffers[name].to(first), t) for name, first in start.buffers.items()}


def _buffers(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in named.items() if t.is_floating_point()}


def _check_places(objective: Objective, start: Place, end: Place) -> None:
    n = objective.num_params
    for place in (start, end):
        if place.vector.shape != (n,):
            raise InputError(f"{place.name} must have shape ({n},), got {tuple(place.vector.shape)}.")
    if set(start.buffers) != set(end.buffers):
        odd = min(set(start.buffers) ^ set(end.buffers))
        raise InputError(f"both ends must have the same buffers; {odd!r} is in one of them only.")
