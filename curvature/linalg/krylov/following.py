"""The largest eigenvalue of a matrix that moves a little at a time, from the vectors that it had before.

A few Lanczos steps from the last eigenvector, carried on by what it last moved by if that was little, with a little of
a random vector, in which an eigenvector that overtakes it has a part. It is a recurrence of its own because a step of
`KrylovSpace` takes longer than the product of a small network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import NonFiniteError
from curvature.linalg.base.validate import non_finite_message
from curvature.linop import MatrixLike

__all__ = ["Followed", "follow_largest"]

_NOISE = 0.05  # part of the random vector in a start, beside an eigenvector of norm 1
_ROWS = 4  # of the basis to begin with
_COLD = 1e-2  # relative residual at which a run from a random start ends
_RELATED = 0.9  # cosine from which on an eigenvector is taken to move on the way it did, and not back and forth


@dataclass(frozen=True, kw_only=True)
class Followed:
    """The largest eigenvalue as far as a few products tell."""

    value: float
    """Ritz value: no larger than the largest eigenvalue but for rounding."""
    residual: float
    """|A u - value u|: some eigenvalue lies within it."""
    vector: Tensor
    """u, (n,), of norm 1; its sign goes on from before."""
    earlier: Tensor | None
    """The u before; None at the first."""
    num_matvecs: int
    """Products."""


def follow_largest(
    A: MatrixLike, before: Followed | None, *, rtol: float = 3e-2, max_matvecs: int = 12, generator: torch.Generator
) -> Followed:
    """Return the largest eigenvalue of A, from where a nearby matrix had it.

    Steps end at a residual of `rtol` of the eigenvalue, whose own error is then about the residual's square over the
    gap to the next one: 2 products where the matrix moved little, 5 where eigenvalues lie close and vectors turn.
    Without `before` they begin at a random vector, up to 40 of them, and end at a residual of 1 %.
    Memory: a vector a product, and up to twice as many in a long run.

    Raises:
        NonFiniteError: if a product is not finite.
    """
    n = int(A.shape[0])
    z = torch.randn(n, generator=generator, dtype=A.dtype, device=A.device)
    start, most, least = z, min(40, n), 1
    if before is not None:
        u, old = before.vector, before.earlier
        start, most, least = u + _NOISE * z / z.norm(), min(max_matvecs, n), 2
        if old is not None and float(u @ old) > _RELATED:
            start = start + u - old
    basis = torch.empty(min(_ROWS, most), n, dtype=A.dtype, device=A.device)
    diagonal: list[float] = []
    beside: list[float] = []
    q = start / start.norm()
    while True:
        if len(diagonal) == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)[: most - len(basis)]])
        basis[len(diagonal)] = q
        w, V = A @ q, basis[: len(diagonal) + 1]
        image = _norm(w)
        if not math.isfinite(image):
            raise NonFiniteError(non_finite_message(len(diagonal) + 1))
        diagonal.append(float(w @ q))
        w = w - V.T @ (V @ w)
        w = w - V.T @ (V @ w)
        beta = _norm(w)
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        theta, S = torch.linalg.eigh(T)
        value = float(theta[-1])
        residual, steps = beta * abs(float(S[-1, -1])), len(diagonal)
        settled = steps >= least and residual <= (_COLD if before is None else rtol) * abs(value)
        if settled or steps == most or beta <= torch.finfo(A.dtype).eps * image:
            break
        beside.append(beta)
        q = w / beta
    u = S[:, -1].to(V) @ V
    earlier = None if before is None else before.vector
    if earlier is not None and float(u @ earlier) < 0:
        u = -u
    return Followed(value=value, residual=residual, vector=u, earlier=earlier, num_matvecs=steps)


def _norm(w: Tensor) -> float:
    """Return the norm, whose squares a narrow dtype would lose."""
    return float(torch.linalg.vector_norm(w, dtype=torch.float64))
