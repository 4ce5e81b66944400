"""Directions in the space of the parameters: random, sharpest, steepest, to a checkpoint, along a trajectory.

A network of ReLUs is the same function after the weights of one layer are multiplied by a and those of the next are
divided by it, but a raw random step means something else then. Filter normalisation removes that: each filter of the
direction is given the norm of the same filter of the weights, and a step of 1 perturbs all of them by as much again.

Reference: Li, Xu, Taylor, Studer and Goldstein (2018), Visualizing the loss landscape of neural nets, arXiv 1712.09913.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from analysis.landscape.results import Direction
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.layerwise.filters import filter_dims, kept_filters
from curvature.linalg import eigsh
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors

__all__ = [
    "Scaling",
    "custom_direction",
    "direction_to",
    "eigenvector_directions",
    "gradient_direction",
    "random_direction",
    "trajectory_directions",
]

Scaling = Literal["filter", "layer", "raw", "unit"]


@in_whole_vectors
@full_precision
@checked
def random_direction(
    objective: Objective,
    *,
    scaling: Scaling = "filter",
    scale_vectors: bool = False,
    generator: AnyGenerator,
    name: str = "random",
) -> Direction:
    """Return a direction of independent normal entries, scaled.

    - "filter": each filter has the norm of the same filter of the weights; what weighs the inputs of one output unit is
      a filter (a row of a linear layer or embedding, the kernels of one output channel).
    - "layer": each tensor has the norm of the same tensor of the weights.
    - "raw": as drawn, of length sqrt(n) or so, all parameters included.
    - "unit": as drawn, divided by its length.

    Biases and the parameters of normalisation layers (all tensors with fewer than two dimensions) stay where they are
    in the first two, as in the paper; `scale_vectors` moves them too, each as one filter. A filter of zeros stays zero.
    Of masked weights (`sparse_model`) the kept entries of a row are a filter.

    Args:
        objective: at the point of interest.
        scaling: one of the above.
        scale_vectors: whether biases and their like move with "filter" and "layer".
        generator: source of the entries, on the objective's device, or a seed.
        name: for display.

    Raises:
        InputError: for another scaling, or if nothing would move.
    """
    if scaling not in get_args(Scaling):
        raise InputError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}.")
    space = objective.space
    generator = as_generator(generator, objective.device)
    drawn = torch.randn(space.num_params, generator=generator, dtype=space.dtype, device=space.device)
    if scaling == "raw":
        return _direction(name, "random", scaling, drawn)
    if scaling == "unit":
        return _direction(name, "random", scaling, drawn / drawn.norm())
    dims, kept = filter_dims(objective.model), kept_filters(objective.model)
    parts = {}
    for key, d in space.to_dict(drawn).items():
        weights = space.tensors[key].detach().to(space.dtype)
        if key in kept:
            parts[key] = _of_norms(d, weights, kept[key]) if scaling == "filter" else _of_norm(d, weights, None)
        elif weights.ndim < 2:
            parts[key] = _of_norm(d, weights, None) if scale_vectors else torch.zeros_like(d)
        else:
            parts[key] = _of_norm(d, weights, dims.get(key, 0) if scaling == "filter" else None)
    vector = space.to_flat(parts)
    if not bool(vector.any()):
        raise InputError(
            f"scaling {scaling!r} moves none of the chosen parameters: they have fewer than two dimensions or are "
            'zero; use scale_vectors=True, or scaling="raw".'
        )
    return _direction(name, "random", scaling, vector)


@in_whole_vectors
@full_precision
@checked
def eigenvector_directions(
    objective: Objective,
    k: int = 2,
    *,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    rtol: float = 1e-3,
    generator: AnyGenerator,
) -> tuple[tuple[Direction, ...], int]:
    """Return k unit eigenvectors of the Hessian, eigenvalues descending, and the products they took.

    The sign of each is such that its largest entry is positive.

    Raises:
        InputError: for arguments out of range.
        NotConvergedError: if the tolerance was not reached.
    """
    pairs = eigsh(objective, k, which=which, rtol=rtol, generator=generator).raise_if_failed()
    found = []
    for i, u in enumerate(pairs.eigenvectors.unbind(1), start=1):
        sign = torch.sign(u[u.abs().argmax()])
        found.append(_direction(f"eigenvector {i}", "eigenvector", "unit", sign * u))
    return tuple(found), pairs.num_matvecs


@in_whole_vectors
@checked
def gradient_direction(objective: Objective) -> Direction:
    """Return the gradient, of unit length: steps above 0 go uphill.

    Raises:
        InputError: if the gradient is zero.
    """
    g = objective.gradient()
    norm = g.norm()
    if norm == 0:
        raise InputError("the gradient is zero, so it has no direction; take random directions or eigenvectors.")
    return _direction("gradient", "gradient", "unit", g / norm)


@in_whole_vectors
@full_precision
@checked
def direction_to(objective: Objective, target: Tensor, *, name: str = "checkpoint", unit: bool = False) -> Direction:
    """Return the way from the objective's point to other parameters (n,): they are at step 1, or at |d| with `unit`.

    Raises:
        InputError: for another shape, or if the two are the same.
    """
    n = objective.num_params
    if target.shape != (n,):
        raise InputError(f"target must be a vector of shape ({n},), got {tuple(target.shape)}.")
    d = target.to(objective.device, objective.dtype) - objective.space.current()
    if not bool(d.any()):
        raise InputError("the target is the objective's own point, so it has no direction; take other parameters.")
    return _direction(name, "checkpoint", "unit" if unit else "difference", d / d.norm() if unit else d)


@in_whole_vectors
@checked
def custom_direction(objective: Objective, vector: Tensor, *, name: str) -> Direction:
    """Return the given vector (n,) as a direction, unscaled.

    Raises:
        InputError: for another shape, entries that are not finite, or zero.
    """
    n = objective.num_params
    if vector.shape != (n,) or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise InputError(f"a direction must be a finite vector of shape ({n},) that is not zero; got another.")
    return _direction(name, "custom", "raw", vector.to(objective.device, objective.dtype))


@in_whole_vectors
@full_precision
@checked
def trajectory_directions(
    objective: Objective, checkpoints: Sequence[Tensor]
) -> tuple[tuple[Direction, Direction], Tensor, Tensor, tuple[float, float]]:
    """Return the plane through the objective's point that checkpoints are nearest to, and where they are in it.

    With rows theta_i - theta of M = U S V', the directions are the first two columns of V: orthonormal, and of all
    planes through theta the one with the least sum of squared distances. The paper applies principal component
    analysis to M; libraries centre at the mean of the rows first, whose plane does not pass through theta, so that
    trajectory and contours belong to different planes.

    Args:
        objective: at the point of interest, which is the centre of the plane.
        checkpoints: k >= 2 vectors (n,), in order of time, not all on one line through the point.

    Returns:
        The two directions; coordinates (k, 2); distances from the plane (k,); share of the sum of squares along each.

    Raises:
        InputError: for fewer than two checkpoints, other shapes, or checkpoints on a line.
    """
    n = objective.num_params
    if len(checkpoints) < 2 or any(c.shape != (n,) for c in checkpoints):
        raise InputError(f"a trajectory takes two or more checkpoints of shape ({n},), got {len(checkpoints)}.")
    here = objective.space.current()
    M = torch.stack([c.to(objective.device, objective.dtype) - here for c in checkpoints])
    scale = M.abs().max()
    if not bool(torch.isfinite(scale)) or scale == 0:
        raise InputError("the checkpoints must be finite and differ from the objective's point; got others.")
    wide = (M / scale).double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)  # k x k: its float64 leaves M the digits of float32
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if values[1] <= 1e-12 * values[0]:
        raise InputError("the checkpoints lie on one line through the point, which spans no plane; take direction_to.")
    V = wide.T @ vectors[:, :2] / values[:2].sqrt()
    V = V * torch.sign(V.gather(0, V.abs().argmax(0, keepdim=True)))
    coordinates = wide @ V
    distances = (wide - coordinates @ V.T).norm(dim=1)
    names = ("component 1", "component 2")
    columns = V.to(objective.dtype).unbind(1)
    first, second = (_direction(name, "trajectory", "unit", v) for name, v in zip(names, columns, strict=True))
    shares = (values[:2] / values.sum()).tolist()
    return (first, second), (scale * coordinates).cpu(), (scale * distances).cpu(), (shares[0], shares[1])


def _direction(name: str, kind: str, scaling: str, vector: Tensor) -> Direction:
    return Direction(name=name, kind=kind, scaling=scaling, norm=float(vector.norm()), vector=vector.contiguous())


def _of_norms(d: Tensor, weights: Tensor, filters: Tensor) -> Tensor:
    """Return `d`, (k,), with the entries of each filter of the norm they have in `weights`."""
    have, want = (
        d.new_zeros(int(filters.max()) + 1 if len(filters) else 0).index_add(0, filters, t.square()).sqrt()
        for t in (d, weights)
    )
    return d * torch.where(have > 0, want / torch.where(have > 0, have, 1), 0)[filters]


def _of_norm(d: Tensor, weights: Tensor, dim: int | None) -> Tensor:
    """Return `d` with each slice along a dimension, or the whole, of the norm it has in `weights`."""
    others = [i for i in range(d.ndim) if i != dim] if dim is not None else list(range(d.ndim))
    have = torch.linalg.vector_norm(d, dim=others, keepdim=True)
    want = torch.linalg.vector_norm(weights, dim=others, keepdim=True)
    return torch.where(have > 0, d * (want / torch.where(have > 0, have, 1)), 0)
