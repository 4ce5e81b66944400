"""Preconditioners of damped Newton systems: from probes, from eigenpairs kept for several steps, or the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature.linalg.low_rank.low_rank import DiagonalOnSubspace
from curvature.linalg.low_rank.randomized_eigh import randomized_eigh
from curvature.linalg.stochastic.diagonal import diagonal
from curvature.linalg.systems.preconditioner import DiagonalPreconditioner
from curvature.linop import MatrixLike
from optimizers.newton.flat import FlatParams

if TYPE_CHECKING:
    from optimizers.newton.full_batch import FullBatchOptimizer

__all__ = ["Preconditioner", "largest_pairs", "newton_preconditioner", "sketch_is_due"]

Preconditioner = Callable[[MatrixLike, float, torch.Generator], Any]
"""(A, damping, generator) -> an object whose `@` applies P^-1, symmetric positive definite."""

_STREAM = 11  # of the seed, apart from the other uses of it


def newton_preconditioner(optimizer: FullBatchOptimizer, flat: FlatParams, A: MatrixLike, damping: float) -> Any:
    """Return the preconditioner that `optimizer.preconditioner` names, for A + damping I."""
    wanted: Any = optimizer.preconditioner  # type: ignore[attr-defined]
    if wanted is None:
        return None
    group = optimizer.param_groups[0]
    generator = optimizer._generator(flat, _STREAM)
    if wanted == "diagonal":
        estimate = diagonal(A, method="hutchinson", num_matvecs=group["rank"], generator=generator)
        d = estimate.value.abs()
        floor = torch.finfo(d.dtype).eps ** 0.5 * float(d.max()) or 1.0
        return DiagonalPreconditioner(d, damping=max(damping, floor), power=0.75)
    if wanted == "nystrom":
        values, U = largest_pairs(optimizer, flat, A, generator)
        sizes = values.abs()
        floor = torch.finfo(sizes.dtype).eps ** 0.5 * float(sizes.max()) or 1.0
        damped = sizes + max(damping, floor)
        return DiagonalOnSubspace(U, damped.min() / damped, 1.0)
    return wanted(A, damping, generator)


def sketch_is_due(optimizer: FullBatchOptimizer, flat: FlatParams) -> bool:
    """Whether eigenpairs are to be computed: at every so many-th step, and where those kept are of other parameters."""
    group = optimizer.param_groups[0]
    return group["num_steps"] % group["refresh_every"] == 0 or _kept_pairs(optimizer, flat) is None


def largest_pairs(
    optimizer: FullBatchOptimizer, flat: FlatParams, A: MatrixLike | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of A largest in magnitude, as of the last refresh; they are kept in the state.

    Magnitudes serve an indefinite Hessian, where a factorisation of a Nystrom core would fail. A may be None where no
    refresh is due.
    """
    if A is not None and sketch_is_due(optimizer, flat):
        group = optimizer.param_groups[0]
        rank = min(int(group["rank"]), flat.n)
        found = randomized_eigh(
            A, rank, oversampling=min(5, flat.n - rank), power_iterations=0, num_tests=0, generator=generator
        )
        optimizer._remember(flat, sketch_vectors=found.eigenvectors)
        for p in flat.params:
            state = optimizer.state[p]
            state["sketch_values"] = found.eigenvalues.clone()
            state["sketch_of"] = torch.tensor([group["num_steps"], flat.n])
    kept = _kept_pairs(optimizer, flat)
    assert kept is not None
    return kept


def _kept_pairs(optimizer: FullBatchOptimizer, flat: FlatParams) -> tuple[Tensor, Tensor] | None:
    """Return the eigenpairs kept for exactly these parameters; None where some came or went since."""
    states = [optimizer.state[p] for p in flat.params]
    sketches = [state.get("sketch_of") for state in states]
    first = sketches[0]
    if first is None or int(first[1]) != flat.n or any(s is None or s.tolist() != first.tolist() for s in sketches):
        return None
    U = optimizer._recall(flat, "sketch_vectors")
    return None if U is None else (states[0]["sketch_values"].to(flat.device, flat.dtype), U)
