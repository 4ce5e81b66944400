"""A symmetric matrix in a few eigenpairs, A ~ U diag(values) U', and how far it may be off.

The error E = A - U diag(values) U' is tested on fresh normal vectors w, drawn independently of the approximation. As
|E w| is at least |E|_2 |g| for a standard normal g, c tests give

    |E|_2 <= max_i |E w_i| / q,  q = sqrt(2) erfinv(p^(1/c)),

which fails with probability p at most, exactly p for an error of rank one; and |E w|^2 has the mean |E|_F^2.

Reference: Halko, Martinsson and Tropp (2011), Finding structure with randomness, section 4.3, where q is replaced by a
lower bound; Frangella, Tropp and Udell (2023), Randomized Nystrom preconditioning, for the preconditioner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linop import SymmetricOperator
from curvature.results.estimates import Estimate, Status, mean_and_stderr
from curvature.results.intervals import skewness
from curvature.results.record import Result


class DiagonalOnSubspace(SymmetricOperator):
    """U diag(values) U' + rest (I - U U'): diagonal in a few directions, a multiple of the identity in all others.

    Cost of a product: 4 n k operations a column, none with A.
    """

    def __init__(self, U: Tensor, values: Tensor, rest: float) -> None:
        n = U.shape[0]
        super().__init__((n, n), U.dtype, U.device)
        self.U, self.values, self.rest = U, values, float(rest)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.rest * X + self.U @ ((self.values - self.rest)[:, None] * (self.U.T @ X))


@dataclass(frozen=True, kw_only=True, repr=False)
class ErrorCurve(Result):
    """The error that is left where only the pairs largest in magnitude are kept, by their number."""

    ranks: Tensor
    """(k + 1,), pairs that are kept: 0, 1, ..., k."""
    frobenius: Tensor
    """(k + 1,), estimate of |A - A_j|_F; units of A."""
    frobenius_stderr: Tensor
    """(k + 1,), its standard error over the tests."""
    spectral_bound: Tensor
    """(k + 1,), |A - A_j|_2 is no larger; each fails with probability `failure_probability`. Units of A."""
    failure_probability: float
    """Of each bound, at most."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Result):
    """A symmetric A of size n as U diag(values) U', with an error estimate from fresh probes.

    It is a matrix itself: `@`, `shape`, `dtype` and `device` make an operand of it for sums, shifts and solvers. By
    Weyl's inequality every eigenvalue of A lies within `error_bound` of the one of the approximation that has its rank
    in order (those beyond the k pairs are 0).
    """

    _large = ("eigenvectors",)

    eigenvalues: Tensor
    """(k,), descending; units of A."""
    eigenvectors: Tensor
    """(n, k), orthonormal columns."""
    test_norms: Tensor
    """(k + 1, num_tests), |(A - A_j) w_i| for standard normal w_i that nothing else depends on, where A_j has the j
    pairs largest in magnitude; units of A."""
    failure_probability: float
    """Probability that `error_bound` is too small, at most."""
    test_failure_probability: float
    """Its share for the last test; smaller where a growing approximation was tested several times."""
    residual_norms: Tensor | None
    """(k,), |A u - lambda u|_2, computed; units of A. None where A was not multiplied by the eigenvectors."""
    converged: Tensor | None
    """(k,), bool: whether the residual is below the tolerance asked for. None without residuals."""
    num_matvecs: int
    """Products with A that were spent, tests included."""
    status: Status
    """Whether the accuracy that was asked for was reached."""

    @property
    def shape(self) -> tuple[int, int]:
        n = self.eigenvectors.shape[0]
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        return self.eigenvectors.dtype

    @property
    def device(self) -> torch.device:
        return self.eigenvectors.device

    @property
    def error_bound(self) -> Tensor:
        """(), |A - U diag(values) U'|_2 is no larger, but for `failure_probability`; infinite without tests."""
        return spectral_bound(self.test_norms[-1], self.test_failure_probability)

    @property
    def frobenius_error(self) -> Estimate:
        """An estimate of |A - U diag(values) U'|_F and its standard error over the tests, units of A."""
        curve, squares = self.error_curve(), self.test_norms[-1].square()
        value, stderr = curve.frobenius[-1], curve.frobenius_stderr[-1]
        return Estimate(value=value, stderr=stderr, dof=len(squares) - 1.0, skewness=skewness(squares).to(value))

    def error_curve(self) -> ErrorCurve:
        """Return the error by the number of pairs that are kept, from the same tests."""
        square, stderr = mean_and_stderr(self.test_norms.square(), dim=1)
        root = square.sqrt()
        halved = stderr / (2 * root.clamp_min(torch.finfo(root.dtype).tiny))  # the spread of a root
        return ErrorCurve(
            ranks=torch.arange(len(root)),
            frobenius=root,
            frobenius_stderr=halved,
            spectral_bound=spectral_bound(self.test_norms, self.test_failure_probability),
            failure_probability=self.failure_probability,
        )

    def __matmul__(self, X: Tensor, /) -> Tensor:
        """Return U diag(values) U' X for X of shape (n,) or (n, c)."""
        return DiagonalOnSubspace(self.eigenvectors, self.eigenvalues, 0.0) @ X

    def to_dense(self) -> Tensor:
        """Return the approximation as a tensor (n, n)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def inverse(self, damping: float) -> DiagonalOnSubspace:
        """Return (U diag(values) U' + damping I)^-1 as an operator; what is inverted must be positive definite."""
        self._check_damping(damping)
        return DiagonalOnSubspace(self.eigenvectors, 1 / (self.eigenvalues + damping), 1 / damping)

    def preconditioner(self, damping: float) -> DiagonalOnSubspace:
        """Return P = (values_k + damping) U (diag(values) + damping)^-1 U' + I - U U', for solving with A + damping I.

        `P @ X` brings A + damping I near a multiple of the identity: for positive semi-definite A the condition number
        falls to `condition_bound(damping)` at most. For use as `preconditioner=` of `cg` with the system's damping,
        which must make the approximation positive definite.

        Reference: Frangella, Tropp and Udell (2023), section 5.
        """
        self._check_damping(damping)
        damped = self.eigenvalues + damping
        return DiagonalOnSubspace(self.eigenvectors, damped[-1] / damped, 1.0)

    def condition_bound(self, damping: float) -> Tensor:
        """Return what bounds the condition number of A + damping I once preconditioned, A positive semi-definite.

        (values_k + damping + error_bound) / damping, but for `failure_probability`.

        Reference: Frangella, Tropp and Udell (2023), proposition 5.3.
        """
        self._check_damping(damping)
        return (self.eigenvalues[-1] + damping + self.error_bound) / damping

    def _outcome(self) -> str:
        k = len(self.eigenvalues)
        pairs = f"{k}" if self.converged is None else f"{int(self.converged.sum())} of {k}"
        return (
            f"{pairs} eigenpairs, |A - U diag(values) U'| <= {self.error_bound:.3g} with probability "
            f"{1 - self.failure_probability:.4g}, after {self.num_matvecs} products"
        )

    def _check_damping(self, damping: float) -> None:
        smallest = float(self.eigenvalues[-1])
        if not damping > max(0.0, -smallest):
            raise InputError(
                f"damping must be positive and exceed {-smallest:.3g}, so that the damped approximation is positive "
                f"definite, got {damping}; for indefinite matrices use minres, without a preconditioner."
            )


def error_norms(W: Tensor, AW: Tensor, values: Tensor, U: Tensor) -> Tensor:
    """Return |(A - A_j) w_i| for the j pairs largest in magnitude, j = 0 ... k, (k + 1, c).

    From the last error upward, so that nothing small is the difference of large numbers: with R = A W - U diag(values)
    U' W and T = diag(values) U' W, |R + sum_(i > j) u_i T_i|^2 = |R|^2 + sum_(i > j) (2 (u_i' R) T_i + T_i^2).
    """
    order = values.abs().argsort(descending=True)
    values, U = values[order], U[:, order]
    T = values[:, None] * (U.T @ W)
    R = AW - U @ T
    gains = 2 * (U.T @ R) * T + T.square()
    above = torch.cat([gains.flip(0).cumsum(dim=0).flip(0), torch.zeros_like(gains[:1])])
    return (R.square().sum(dim=0) + above).clamp_min(0).sqrt()


def spectral_bound(norms: Tensor, failure_probability: float) -> Tensor:
    """Return what bounds |E|_2 by |E w_i| for independent standard normal w_i along the last axis, (...).

    Fails with probability `failure_probability` at most; infinite without tests.
    """
    count = norms.shape[-1]
    if count == 0:
        return norms.new_full(norms.shape[:-1], torch.inf)
    share = torch.tensor(failure_probability, dtype=torch.float64) ** (1 / count)
    return norms.amax(dim=-1) / float(2**0.5 * torch.erfinv(share))
