"""The Lanczos decomposition of a symmetric matrix, with full reorthogonalisation.

From a start vector v0 it builds an orthonormal basis Q of the Krylov space span{v0, A v0, A^2 v0, ...} in which A is
tridiagonal:  A Q = Q T + r e_m',  Q'r = 0.

Reference: Golub and Van Loan, Matrix Computations, 4th ed., section 10.1; twice is enough: Giraud et al. (2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg._validate import check_count, check_finite, check_square, working_dtype
from curvature.linop import MatrixLike

__all__ = ["Krylov", "lanczos", "ritz"]


@dataclass(frozen=True, kw_only=True)
class Krylov:
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


def lanczos(A: MatrixLike, v0: Tensor, *, num_steps: int) -> Krylov:
    """Run up to `num_steps` Lanczos steps from v0; fewer if the Krylov space is exhausted before.

    Cost: one product a step and 4 n m operations for keeping the basis orthonormal. Memory: m vectors.

    Args:
        A: symmetric, (n, n). Its symmetry is not checked.
        v0: (n,), not zero.
        num_steps: m, in [1, n].

    Raises:
        InputError: for shapes and counts out of range, or v0 = 0.
        NonFiniteError: if a product is not finite.
    """
    n = check_square(A)
    check_count("num_steps", num_steps, 1, n)
    dtype = working_dtype(A)
    if v0.shape != (n,):
        raise InputError(f"v0 must be a vector of shape ({n},), got {tuple(v0.shape)}.")
    q = v0.to(dtype)
    if not bool(q.norm() > 0):
        raise InputError("v0 must have a norm that is positive and finite, got zero or NaN.")
    Q = torch.empty(num_steps, n, dtype=dtype, device=A.device)  # rows, so that growing it copies nothing
    Q[0] = q / q.norm()
    alpha, beta, scale = [], [], 0.0
    for j in range(num_steps):
        r = check_finite((A @ Q[j].to(A.dtype)).to(dtype), j + 1)
        scale = max(scale, float(r.norm()))
        alpha.append(Q[j] @ r)
        basis = Q[: j + 1]
        for _ in range(2):  # twice is enough
            r = r - basis.T @ (basis @ r)
        b = r.norm()
        exhausted = bool(b <= 10 * n**0.5 * torch.finfo(dtype).eps * scale)
        if exhausted or j + 1 == num_steps:
            break
        beta.append(b)
        Q[j + 1] = r / b
    exhausted = exhausted or len(alpha) == n
    return Krylov(
        basis=Q[: len(alpha)].T,
        alpha=torch.stack(alpha),
        beta=torch.stack(beta) if beta else Q.new_empty(0),
        residual=torch.zeros_like(r) if exhausted else r,
        residual_norm=torch.zeros_like(b) if exhausted else b,
        breakdown=exhausted,
        num_matvecs=len(alpha),
    )


def ritz(krylov: Krylov) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of T, ascending (m,), and its eigenvectors as columns (m, m), in float64 on the CPU.

    The squared first components of the eigenvectors are the Gauss weights of the spectral measure that v0 sees.
    """
    alpha, beta = krylov.alpha.double().cpu(), krylov.beta.double().cpu()
    return torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
