"""The Lanczos decomposition of a symmetric matrix, with full reorthogonalisation.

From a start vector v0 it builds an orthonormal basis Q of the Krylov space span{v0, A v0, A^2 v0, ...} in which A is
tridiagonal:  A Q = Q T + r e_m',  Q'r = 0.

Several start vectors at a time share their products, one block a step, and nothing else.

Reference: Golub and Van Loan (2013), Matrix Computations, 4th ed., section 10.1; twice is enough: Giraud et al. (2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.validate import check_count, check_square, working_dtype
from curvature.linalg.krylov._lanczos_process import LanczosProcess
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.record import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Krylov(Result):
    """A Q = Q T + residual e_m', with T tridiagonal of diagonal alpha and off-diagonal beta."""

    basis: Tensor
    """Q, (n, m), orthonormal columns; the first is v0 / |v0|."""
    alpha: Tensor
    """(m,), diagonal of T; units of A."""
    beta: Tensor
    """(m - 1,), off-diagonal of T, positive; units of A."""
    residual: Tensor
    """r, (n,), orthogonal to the basis; zero after a breakdown."""
    residual_norm: Tensor
    """(), |r|; units of A."""
    breakdown: bool
    """Whether the basis spans an invariant space: T's eigenvalues are eigenvalues of A."""
    num_matvecs: int
    """Products that were spent: m."""


@numerics
def lanczos(A: AnyMatrix, v0: Tensor, *, matrix: MatrixName = "hessian", num_steps: int) -> Krylov:
    """Run up to `num_steps` Lanczos steps from v0; fewer if the Krylov space is exhausted before.

    Cost: one product a step and 4 n m operations for keeping the basis orthonormal. Memory: m vectors.

    Args:
        v0: (n,), not zero.
        num_steps: m, in [1, n].

    Raises:
        InputError: for shapes and counts out of range, or v0 = 0.
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    if v0.shape != (n,):
        raise InputError(f"v0 must be a vector of shape ({n},), got {tuple(v0.shape)}.")
    runs = lanczos_runs(A, v0[:, None], num_steps=num_steps)
    m = runs.num_matvecs
    return Krylov(
        basis=runs.basis[0, :m].T,
        alpha=runs.alpha[0, :m],
        beta=runs.beta[0, : m - 1],
        residual=runs.residual[0],
        residual_norm=runs.residual_norm[0],
        breakdown=runs.breakdown[0],
        num_matvecs=m,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class KrylovRuns(Result):
    """What `Krylov` holds, for p runs at once; a run that broke down early has zeros in its later places."""

    basis: Tensor
    """(p, m, n), orthonormal rows."""
    alpha: Tensor
    """(p, m)."""
    beta: Tensor
    """(p, m - 1)."""
    residual: Tensor
    """(p, n)."""
    residual_norm: Tensor
    """(p,)."""
    breakdown: list[bool]
    """Which runs exhausted their Krylov space."""
    num_matvecs: int
    """Products that were spent, over all runs."""


@numerics
def lanczos_runs(A: AnyMatrix, X: Tensor, *, matrix: MatrixName = "hessian", num_steps: int) -> KrylovRuns:
    """Run Lanczos from every column of X, (n, p); arguments and errors as for `lanczos`. Memory: p m vectors."""
    A = as_matrix(A, matrix)
    n = check_square(A)
    check_count("num_steps", num_steps, 1, n)
    if X.ndim != 2 or X.shape[0] != n or X.is_complex():
        raise InputError(f"X must be real, of shape ({n}, p), got {X.dtype} of shape {tuple(X.shape)}.")
    norms = torch.linalg.vector_norm(X.to(working_dtype(A)), dim=0)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise InputError("v0 must have a norm that is positive and finite, got zero, infinity or NaN.")
    level, room = 10 * torch.finfo(norms.dtype).eps, min(num_steps + 1, n)
    process, j = LanczosProcess(A, X.to(norms) / norms, capacity=room, level=level), 0
    while j < num_steps and not process.over:
        process.step()
        j += 1
    alpha, beta = norms.new_zeros(2, len(norms), num_steps)
    for i, (a, b) in enumerate(zip(process.alpha, process.beta, strict=True)):
        alpha[i, : len(a)], beta[i, : len(b)] = norms.new_tensor(a), norms.new_tensor(b)
    going = process.m > j  # the last of the vectors are those that would come next
    last = beta[:, -1] if going else torch.zeros_like(norms)
    return KrylovRuns(
        basis=process.V[:, :num_steps],
        alpha=alpha,
        beta=beta[:, :-1],
        residual=last[:, None] * process.V[:, process.m - 1],
        residual_norm=last,
        breakdown=list(process.resting),
        num_matvecs=process.num_matvecs,
    )


@numerics
def ritz(krylov: Krylov | KrylovRuns) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of T, ascending (m,), and its eigenvectors as columns (m, m), in float64 on the CPU.

    The squared first components of the eigenvectors are the Gauss weights of the spectral measure that v0 sees. For
    several runs each has one dimension more in front.
    """
    alpha, beta = krylov.alpha.double().cpu(), krylov.beta.double().cpu()
    return torch.linalg.eigh(torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1))
