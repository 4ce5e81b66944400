"""The Lanczos decomposition of a symmetric matrix, with full reorthogonalisation.

From a start vector v0 it builds an orthonormal basis Q of the Krylov space span{v0, A v0, A^2 v0, ...} in which A is
tridiagonal:  A Q = Q T + r e_m',  Q'r = 0.

Several start vectors at a time share their products, one block a step, and nothing else.

Reference: Golub and Van Loan, Matrix Computations, 4th ed., section 10.1; twice is enough: Giraud et al. (2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.validate import check_count, check_finite, check_square, unit_of, working_dtype
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
        A: symmetric, (n, n). Its symmetry is not checked.
        matrix: which one of an objective; see `as_matrix`.
        v0: (n,), not zero.
        num_steps: m, in [1, n].

    Raises:
        InputError: for shapes and counts out of range, or v0 = 0.
        NonFiniteError: if a product is not finite.
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    if v0.shape != (n,):
        raise InputError(f"v0 must be a vector of shape ({n},), got {tuple(v0.shape)}.")
    runs = lanczos_runs(A, v0[:, None], num_steps=num_steps)
    m = runs.num_matvecs
    breakdown = runs.breakdown[0]
    return Krylov(
        basis=runs.basis[0, :m].T,
        alpha=runs.alpha[0, :m],
        beta=runs.beta[0, : m - 1],
        residual=runs.residual[0],
        residual_norm=runs.residual_norm[0],
        breakdown=breakdown,
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
    dtype = working_dtype(A)
    norms = torch.linalg.vector_norm(X.to(dtype), dim=0)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise InputError("v0 must have a norm that is positive and finite, got zero, infinity or NaN.")
    p = X.shape[1]
    Q = torch.zeros(p, num_steps, n, dtype=dtype, device=A.device)
    alpha, beta = Q.new_zeros(p, num_steps), Q.new_zeros(p, num_steps)
    Q[:, 0] = (X.to(dtype) / norms).T
    scale = Q.new_zeros(p)  # of the products so far: what is left of one below rounding of this is nothing
    going, spent = list(range(p)), 0
    R = Q.new_zeros(p, n)
    for j in range(num_steps):
        R.zero_()
        active = slice(None) if len(going) == p else going
        R[active] = (A @ Q[active, j].T.to(A.dtype)).T.to(dtype)
        spent += len(going)
        unit = unit_of(R, spent, first=j == 0)
        R /= unit
        scale = torch.maximum(scale, unit * torch.linalg.vector_norm(R, dim=1))
        alpha[:, j] = unit * (Q[:, j] * R).sum(dim=1)
        basis = Q[:, : j + 1]
        for _ in range(2):  # twice is enough
            R -= ((basis @ R[:, :, None]).mT @ basis)[:, 0]
        b = torch.linalg.vector_norm(R, dim=1)
        check_finite(torch.stack([alpha[:, j], b]), spent)
        ended = b <= 10 * torch.finfo(dtype).eps * scale / unit
        if j + 1 == n:
            ended = torch.ones_like(ended)
        R[ended], beta[:, j] = 0, unit * torch.where(ended, 0, b)
        going = [i for i, over in enumerate(ended.tolist()) if not over]
        if not going or j + 1 == num_steps:
            break
        Q[:, j + 1] = R / torch.where(ended, 1, b)[:, None]
    residual_norm = unit * torch.linalg.vector_norm(R, dim=1)
    return KrylovRuns(
        basis=Q,
        alpha=alpha,
        beta=beta[:, :-1],
        residual=unit * R,
        residual_norm=residual_norm,
        breakdown=[i not in going for i in range(p)],
        num_matvecs=spent,
    )


@numerics
def ritz(krylov: Krylov | KrylovRuns) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of T, ascending (m,), and its eigenvectors as columns (m, m), in float64 on the CPU.

    The squared first components of the eigenvectors are the Gauss weights of the spectral measure that v0 sees. For
    several runs each has one dimension more in front.
    """
    alpha, beta = krylov.alpha.double().cpu(), krylov.beta.double().cpu()
    return torch.linalg.eigh(torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1))
