"""The Nystrom approximation of a positive semi-definite matrix, from one pass of products with random vectors.

For a test matrix Omega with orthonormal columns and Y = A Omega, the approximation

    A^ = Y (Omega' Y)^+ Y'

is the best of those from below that agree with A on Omega: 0 <= A^ <= A. It is computed with A + nu I, nu at the level
of rounding, and the shift is taken out of the eigenvalues. Products are never repeated: a larger approximation keeps
the columns of a smaller one, and tests that found it wanting become columns.

Reference: Frangella, Tropp and Udell (2023), Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44,
algorithm 2.1; Tropp, Yurtsever, Udell and Cevher (2017), Fixed-rank approximation of a positive-semidefinite matrix
from streaming data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.places import normal_rows
from curvature.linalg.base.validate import check_count, check_range, check_square, working_dtype
from curvature.linalg.low_rank.low_rank import LowRank, error_norms, spectral_bound
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.results.estimates import Status

_GROWTH = 16  # times the first rank, unless the caller says how far to grow
_NEGATIVE = 10.0  # shifts by which a Rayleigh quotient may be negative before the matrix is called indefinite


@numerics
def nystrom(
    A: AnyMatrix,
    rank: int,
    *,
    matrix: MatrixName = "hessian",
    rtol: float | None = None,
    atol: float | None = None,
    max_rank: int | None = None,
    num_tests: int = 10,
    failure_probability: float = 0.01,
    generator: AnyGenerator,
    callback: Callable[[int, str], None] | None = None,
) -> LowRank:
    """Approximate a positive semi-definite A by k eigenpairs from below, with a bound on the error.

    E |A - A^|_2 <= min over 2 <= p < k of (1 + 2 (k - p) / (p - 1)) lambda_(k-p+1) + 2 e^2 k / (p^2 - 1)
    sum_(j > k - p) lambda_j: for spectra that decay, near the best that k pairs can do. The bound in the result needs
    no knowledge of the spectrum: it is that of `LowRank`, on `num_tests` fresh vectors.

    With `rtol` or `atol` the rank is doubled until the bound is below max(rtol * largest eigenvalue, atol). The j-th
    test may fail with probability p / (j (j + 1)), all together with p. For a preconditioner of A + damping I an `atol`
    of a few times the damping is enough. Below the shift, sqrt(n) eps |A|, nothing is resolved.

    Cost: rank + num_tests products, 2 n k^2 operations around them. Memory: 4 k vectors.

    Args:
        A: symmetric positive semi-definite, (n, n). Indefinite matrices are refused as soon as a negative Rayleigh
            quotient, or one of A - A^, shows; one too small to show does no harm beyond its size.
        rank: columns of the test matrix and pairs of the result, in [1, n]; at first, where it may grow.
        rtol: tolerance of the bound relative to the largest eigenvalue; positive.
        atol: tolerance of the bound in units of A; positive.
        max_rank: largest rank to grow to. Default: 16 times `rank`, n at most.
        num_tests: fresh vectors that test the approximation; without any the bound is infinite.
        failure_probability: with which the bound may be too small, in (0, 1).

    Raises:
        InputError: for arguments out of range; if A is seen not to be positive semi-definite.

    Examples:
        >>> A = torch.diag(2.0 ** -torch.arange(50.0))
        >>> found = nystrom(A, 5, rtol=1e-3, generator=0)
        >>> found.status.name, bool(found.error_bound < 1e-3)
        ('CONVERGED', True)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    generator = as_generator(generator, A.device)
    check_count("rank", rank, 1, n)
    wanted = rtol is not None or atol is not None
    limit = min(n, _GROWTH * rank) if max_rank is None else max_rank
    check_count("max_rank", limit, rank, n)
    check_count("num_tests", num_tests, 1 if wanted else 0)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, got {value}.")
    if not 0 < failure_probability < 1:
        raise InputError(f"failure_probability must be in (0, 1), got {failure_probability}.")
    sketch = _Sketch(A, generator)
    sketch.grow(rank)
    stage = 1
    while True:
        values, U = sketch.approximation()
        W, AW = sketch.tests(num_tests)
        share = failure_probability / (stage * (stage + 1)) if wanted else failure_probability
        norms = error_norms(W, AW, values, U)
        bound, size = float(spectral_bound(norms[-1], share)), float(values[0])
        sketch.check_rayleigh((W * (AW - U @ (values[:, None] * (U.T @ W)))).sum(dim=0) / W.square().sum(dim=0))
        if callback is not None:
            callback(sketch.num_matvecs, f"rank {len(values)}, error at most {bound:.2g} of {size:.2g}")
        status = _status(bound, max((rtol or 0.0) * size, atol or 0.0), sketch) if wanted else Status.BUDGET
        if status is not None or sketch.rank == limit:
            break
        sketch.absorb(W, AW, limit)
        sketch.grow(min(2 * len(values), limit) - sketch.rank)
        stage += 1
    return LowRank(
        eigenvalues=values,
        eigenvectors=U,
        test_norms=norms,
        failure_probability=failure_probability,
        test_failure_probability=share,
        residual_norms=None,
        converged=None,
        num_matvecs=sketch.num_matvecs,
        status=status or Status.MAX_RANK,
    )


def _status(bound: float, tolerance: float, sketch: _Sketch) -> Status | None:
    """Return how the growth ends, or None where it goes on."""
    if bound <= tolerance:
        return Status.CONVERGED
    resolved = sketch.rank == sketch.n or bound <= _NEGATIVE * sketch.shift()
    return Status.STAGNATED if resolved else None


class _Sketch:
    """Omega, orthonormal (n, k), Y = A Omega, and every product that was made for them."""

    def __init__(self, A: MatrixLike, generator: torch.Generator) -> None:
        self.A, self.generator = A, generator
        self.n, self.dtype = int(A.shape[0]), working_dtype(A)
        self.omega = torch.empty(self.n, 0, dtype=self.dtype, device=A.device)
        self.y = torch.empty_like(self.omega)
        self.num_matvecs = 0

    @property
    def rank(self) -> int:
        return self.omega.shape[1]

    def grow(self, count: int) -> None:
        """Add random columns, orthonormal to those there are."""
        if count > 0:
            fresh = self._draw(count)
            for _ in range(2):  # twice is enough
                fresh = torch.linalg.qr(fresh - self.omega @ (self.omega.T @ fresh))[0]
            self._append(fresh, self._multiply(fresh))

    def tests(self, count: int) -> tuple[Tensor, Tensor]:
        """Return standard normal W, as products take them, and A W."""
        W = self._draw(count).to(self.A.dtype).to(self.dtype)
        return W, self._multiply(W) if count else W

    def absorb(self, W: Tensor, AW: Tensor, limit: int) -> None:
        """Make columns of tests whose products are known.

        Where the space left is not wide beside them, what is orthogonal to Omega is ill-conditioned and left alone.
        """
        count = min(W.shape[1], limit - self.rank)
        if self.n - self.rank < 4 * W.shape[1]:
            return
        W, AW = W[:, :count], AW[:, :count]
        H = self.omega.T @ W
        Q, R = torch.linalg.qr(W - self.omega @ H)
        self._append(Q, torch.linalg.solve_triangular(R, AW - self.y @ H, upper=True, left=False))

    def shift(self) -> float:
        """Return nu, the level of rounding: sqrt(n) eps |Y|_2."""
        size = float(torch.linalg.eigvalsh(self.y.T @ self.y)[-1].clamp_min(0).sqrt())
        eps = max(torch.finfo(self.dtype).eps, torch.finfo(self.A.dtype).eps)
        return max(self.n**0.5 * eps * size, torch.finfo(self.dtype).tiny)

    def approximation(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (k,), descending, and eigenvectors (n, k) of Y (Omega' Y)^+ Y'.

        The core is diagonalised where the algorithm factorises it by Cholesky: the same product, and it cannot fail.
        """
        core = self.omega.T @ self.y
        ritz, V = torch.linalg.eigh((core + core.T) / 2)
        self.check_rayleigh(ritz)
        nu = self.shift()
        B = (self.y + nu * self.omega) @ (V / (ritz.clamp_min(0) + nu).sqrt())
        U, sigma, _ = torch.linalg.svd(B, full_matrices=False)
        return (sigma.square() - nu).clamp_min(0), U

    def check_rayleigh(self, quotients: Tensor) -> None:
        """Refuse Rayleigh quotients, of A or of A - A^, that are negative beyond rounding."""
        lowest = float(quotients.min()) if quotients.numel() else 0.0
        if lowest < -_NEGATIVE * self.shift():
            raise InputError(
                f"A must be positive semi-definite, but a Rayleigh quotient is {lowest:.3g}; call randomized_eigh or "
                f"eigsh, which take indefinite matrices, or pass a matrix that is semi-definite by construction, such "
                f"as GGNOperator."
            )

    def _draw(self, count: int) -> Tensor:
        return normal_rows(self.A, count, self.generator).T.to(self.dtype)

    def _append(self, omega: Tensor, y: Tensor) -> None:
        self.omega, self.y = torch.cat([self.omega, omega], dim=1), torch.cat([self.y, y], dim=1)

    def _multiply(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return check_range(self.A @ X.to(self.A.dtype), self.num_matvecs, first=self.rank == 0).to(self.dtype)
