"""What known eigenpairs explain, taken out of a matrix and put back exactly: the control variate of every estimator.

With B = U diag(theta) U' the trace of A is tr B + tr(A - B), and its diagonal diag B + diag(A - B). The first part is
exact and needs no product; an unbiased estimate of the second is one of the whole, however inaccurate the pairs are.
What accuracy buys is variance: |A - B|_F^2 instead of |A|_F^2.

A - B need not be semi-definite where A is and the pairs are inexact. (I - UU') A (I - UU') is, and has the trace of A -
B where theta are the Rayleigh quotients of U, as those of every solver here are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.validate import working_dtype
from curvature.linop import LinearOperator, MatrixLike, Projected
from curvature.results.estimates import EigenPairs


@dataclass(frozen=True)
class Known:
    """The part B = U diag(theta) U' of a matrix that needs no estimate."""

    trace: float | Tensor
    diagonal: float | Tensor


def deflated(A: MatrixLike, deflate: EigenPairs | None, *, definite: bool = False) -> tuple[MatrixLike, Known]:
    """Return A without its known pairs, whose products cost what those of A cost, and what was taken out.

    With `definite` that is (I - UU') A (I - UU'), semi-definite as A is, and not A - U diag(theta) U'.
    """
    if deflate is None or not len(deflate.eigenvalues):
        return A, Known(0.0, 0.0)
    U, theta = deflate.eigenvectors, deflate.eigenvalues
    if U.ndim != 2 or U.shape != (A.shape[0], len(theta)) or U.device != A.device:
        raise InputError(
            f"deflate must hold eigenvectors of shape ({A.shape[0]}, {len(theta)}) on {A.device}, got "
            f"{tuple(U.shape)} on {U.device}."
        )
    dtype = working_dtype(A)
    U, theta = U.to(dtype), theta.to(U.device, dtype)
    squares = U.square()
    remainder = Projected(A, U.to(A.dtype)) if definite else _Deflated(A, U, theta)
    return remainder, Known(squares.sum(dim=0) @ theta, squares @ theta)


class _Deflated(LinearOperator):
    """A - U diag(theta) U'. The difference is taken in the dtype of U: products of A may be in half precision."""

    def __init__(self, A: MatrixLike, U: Tensor, theta: Tensor) -> None:
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A, self.U, self.theta = A, U, theta

    def _matmat(self, X: Tensor) -> Tensor:
        return (self.A @ X).to(self.U) - self.U @ (self.theta[:, None] * (self.U.T @ X.to(self.U)))
