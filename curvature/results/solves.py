"""What solvers of linear systems, of trust-region subproblems and of matrix functions return.

Fields of solvers that take one right-hand side (n,) or several (n, k) have the shape (...) of the columns: () or (k,).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from curvature.results.estimates import Status
from curvature.results.record import Result

__all__ = ["KeptIterate", "MatrixFunctionResult", "SolveResult", "SubproblemResult"]


@dataclass(frozen=True, kw_only=True, repr=False)
class KeptIterate(Result):
    """What an iteration held on its way."""

    _large = ("x",)

    step: int
    """After how many steps."""
    x: Tensor
    """Of the shape of the right-hand sides."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SolveResult(Result):
    """The solution of (A + damping I) x = b for one or several b, or of a least-squares problem.

    `converged` is judged by residuals that were computed from x at the end, not by those the iteration carries along.
    """

    _large = ("x", "direction", "kept", "named")

    x: Tensor
    """(n,) or (n, k)."""
    residual_norms: Tensor
    """(...), |b - (A + damping I) x|_2, recomputed; units of b."""
    converged: Tensor
    """(...), bool: whether the residual is below the tolerance asked for."""
    statuses: tuple[Status, ...]
    """How the iteration ended, for every column."""
    num_iterations: tuple[int, ...]
    """Steps that were taken, for every column."""
    num_matvecs: int
    """Products with single columns that were spent, with J and J' for least squares."""
    residual_history: Tensor
    """(..., m + 1): residual norms after every step, as the iteration carries them; NaN after a column's end."""
    rtol: float
    """Tolerance asked for: residual <= max(rtol |b|, atol)."""
    atol: float
    """In units of b."""
    damping: float
    """In units of A."""
    model_history: Tensor | None = None
    """(..., m + 1): phi = x'(A + damping I) x / 2 - b'x after every step, from `cg`; NaN after a column's end."""
    kept: tuple[KeptIterate, ...] = ()
    """Iterates that `cg` was asked to keep."""
    direction: Tensor | None = None
    """(n,) or (n, k), unit vectors of no positive curvature that `cg` found; zero for columns without."""
    curvature: Tensor | None = None
    """(...), d'(A + damping I) d for the direction d, not positive beyond rounding; NaN if there is none."""
    gradient_norms: Tensor | None = None
    """(...), |A r| (|A P^-1 r| with a preconditioner), or |J'r - damping x| for `lsmr`, recomputed; NaN where
    it was not needed."""
    method: str = ""
    """Which solver ran and why, where the choice was left to `solve`."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype; `residual_norms`
    hold twice that, in units of A x. None in float64."""
    named: dict[str, Tensor] | None = None
    """The solution by parameter name, where the right-hand side came so."""

    @property
    def status(self) -> Status:
        """The status of the first column that fell short; else that of the first."""
        return next((s for s in self.statuses if not s.ok), self.statuses[0])

    def _outcome(self) -> str:
        done, worst = sum(s.ok for s in self.statuses), float(self.residual_norms.max())
        of = f"{done} of {len(self.statuses)} right-hand sides were solved in {self.num_matvecs} products"
        return f"{of} (largest residual {worst:.2g})"


@dataclass(frozen=True, kw_only=True, repr=False)
class SubproblemResult(Result):
    """A step s that makes the model m(s) = g's + s'A s / 2, or m(s) + sigma/3 |s|^3, small.

    Norms are those of the preconditioner P, |s|^2 = s'P s; without one P = I.
    """

    _large = ("step",)

    step: Tensor
    """s, (n,)."""
    step_norm: float
    """|s|."""
    model_decrease: float
    """-m(s), not negative; with the cubic term where there is one. Units of g's."""
    multiplier: float
    """lambda >= 0 of (A + lambda P) s = -g; sigma |s| for the cubic model. Units of A."""
    on_boundary: bool
    """Whether |s| is the radius."""
    hard_case: bool
    """Whether lambda is -lambda_min(A) to rounding, so that the step holds some of that eigenvector."""
    curvature: float
    """The smallest curvature s'A s / |s|^2 that was found: an upper bound of A's smallest eigenvalue. NaN for none."""
    residual_norm: float
    """|g + A s + lambda P s| in the norm of P^-1, as the iteration carries it; units of g."""
    num_iterations: int
    """Steps that were taken."""
    num_matvecs: int
    """Products with A that were spent."""
    status: Status
    """CONVERGED inside the region, BOUNDARY on its boundary, else why it fell short."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype; `residual_norm`
    holds twice that, in units of |A| |s|, and `curvature` errs by as much, in units of |A|. None in float64.
    """

    def _outcome(self) -> str:
        return f"residual {self.residual_norm:.2g} after {self.num_matvecs} products"


@dataclass(frozen=True, kw_only=True, repr=False)
class MatrixFunctionResult(Result):
    """f(A + damping I) v for one or several v."""

    _large = ("value",)

    value: Tensor
    """(n,) or (n, k)."""
    errors: Tensor
    """(...), estimates of |f(A + damping I) v - value|_2, from how the last approximations differ."""
    bounds: Tensor
    """(...), what that error cannot exceed but for rounding; infinite where no bound is known."""
    num_steps: tuple[int, ...]
    """Lanczos steps that were taken, for every column."""
    num_matvecs: int
    """Products with A that were spent."""
    status: Status
    """Whether the accuracy asked for was reached."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype; `errors` and
    `bounds` hold what twice that changes. None in float64."""

    def _outcome(self) -> str:
        return f"error {float(self.errors.max()):.2g} after {self.num_matvecs} products"
