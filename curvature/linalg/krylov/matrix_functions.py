"""Functions of a symmetric matrix times vectors, f(A) v, by Lanczos.

With V and T from m steps that start at v, f(A) v is approximated by |v| V f(T) e_1: exact for polynomials of degree
m - 1, and for any f within twice the error of the best polynomial of that degree on the spectrum's interval.

For f(x) = x^-1, x^-1/2, x^1/2 and log x, which are integrals of resolvents (x + t)^-1, the error is an integral of the
errors of systems (A + t) x_t = v, whose residuals T tells. A lower bound of the spectrum turns it into a bound:

    |f(A) v - y_m|  <=  int w(t) |r_t| / (lower + t) dt,   |r_t| = |v| beta_1 ... beta_m / prod_i (theta_i + t).

Reference: Saad (1992), Analysis of some Krylov subspace approximations to the matrix exponential operator; Ilic, Turner
and Simpson (2010), and Frommer and Schweitzer (2016), Error bounds and estimates for Krylov subspace approximations of
Stieltjes matrix functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import scipy  # whose parts are imported when used
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import check_damping, powers_of_two, right_hand_sides
from curvature.linalg.base.validate import check_square, check_tolerances, doubted_noise, product_noise, rounding_level
from curvature.linalg.krylov._lanczos_process import LanczosProcess
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import Status
from curvature.results.solves import MatrixFunctionResult

FunctionName: TypeAlias = Literal["inv", "sqrt", "invsqrt", "log", "exp"]

_MOST_STEPS = 200
_SAFETY = 3.0  # an estimate from differences sees only what the last steps changed
_DEFINITE = ("inv", "invsqrt", "log")
_Entrywise: TypeAlias = Callable[[Tensor], Tensor]
_FUNCTIONS: dict[str, tuple[_Entrywise, _Entrywise, _Entrywise]] = {  # f, f', and w by which resolvents are integrated
    "inv": (torch.reciprocal, lambda x: x**-2, torch.zeros_like),
    "sqrt": (torch.sqrt, lambda x: x.rsqrt() / 2, lambda t: t.sqrt() / math.pi),
    "invsqrt": (torch.rsqrt, lambda x: x**-1.5 / 2, lambda t: t.rsqrt() / math.pi),
    "log": (torch.log, torch.reciprocal, torch.ones_like),
    "exp": (torch.exp, torch.exp, torch.zeros_like),
}


@numerics
def matrix_function(
    A: AnyMatrix,
    V: Tensor,
    f: FunctionName | Callable[[Tensor], Tensor],
    *,
    matrix: MatrixName = "hessian",
    rtol: float | None = 1e-5,
    num_steps: int | None = None,
    damping: float = 0.0,
    lower: float | None = None,
    callback: Callable[[int, str], None] | None = None,
) -> MatrixFunctionResult:
    """Return f(A + damping I) v for every column v of V, to errors of rtol |f(A + damping I) v|.

    Errors are estimated by how much the last steps changed the result, extrapolated as a geometric series and taken
    three times; with `lower`, for all names but "exp", by the bound above where that is known, and the iteration stops
    on it. Both contain what rounding may do, (eps |f| + 10 eps |A| |f'|) |v|; where that is all that is left and still
    above the tolerance, the status is STAGNATED. A gap in the spectrum, or a kink in f, can make convergence pause and
    the estimate, not the bound, too small.

    Rounded products of a model are those of another matrix. Twice their error, times |A| |f'| |v|, is in errors
    and bounds, infinite where it reaches an end of f's domain; if that alone is too much, the status is WITHIN_NOISE.

    Steps needed: about sqrt(kappa) log(1 / rtol) / 2 for the roots and the logarithm. Cost: a product a step and
    column, 4 n m operations a step for the basis. Memory: num_steps vectors a column.

    Args:
        V: (n,) or (n, k).
        f: "inv", "sqrt", "invsqrt", "log", "exp", or a function that acts entrywise on eigenvalues, float64 on the CPU.
        rtol: tolerance relative to |f(A + damping I) v|; None spends all of num_steps.
        num_steps: most steps, at least 1. Default: 200, n at most.
        damping: added to A's diagonal; units of A.
        lower: a lower bound, positive, of the eigenvalues of A + damping I, such as `damping` for a positive
            semi-definite A.

    Raises:
        InputError: for arguments out of range, or an f that is not defined on the spectrum, as far as that is seen.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
        >>> result = matrix_function(A, torch.ones(3), "invsqrt")
        >>> result.value.round(decimals=4), result.num_matvecs
        (tensor([1.0000, 0.5000, 0.3333]), 3)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    if rtol is not None:
        check_tolerances(rtol, 0.0)
    check_damping(damping)
    if isinstance(f, str) and f not in get_args(FunctionName):
        raise InputError(f"f must be a function or one of {', '.join(get_args(FunctionName))}, got {f!r}.")
    if lower is not None and not 0 < lower < math.inf:
        raise InputError(f"lower must be positive and finite, got {lower}.")
    if num_steps is not None and num_steps < 1:
        raise InputError(f"num_steps must be at least 1, got {num_steps}.")
    limit = min(n, num_steps or _MOST_STEPS)
    columns, is_vector = right_hand_sides(A, V, n)
    unit = powers_of_two(columns)
    places = columns.any(dim=0).nonzero()[:, 0].tolist()
    values, runs, spent = torch.zeros_like(columns), [], 0
    if places:
        process = LanczosProcess(A, columns[:, places] / unit[places], damping=damping)
        runs = [_Run(f, lower, norm, rounding_level(A)) for norm in process.start_norms]
        _iterate(process, runs, limit, rtol, callback)
        values[:, places] = process.combine([run.h for run in runs]) * unit[places]
        spent = process.num_matvecs
    steps, errors, bounds = [0] * columns.shape[1], torch.zeros_like(unit), torch.zeros_like(unit)
    reached = rtol is None or all(run.below(rtol) for run in runs)
    for i, run in zip(places, runs, strict=True):
        run.allow(doubted_noise(A))
        steps[i], errors[i], bounds[i] = run.num_steps, run.error * unit[i], run.bound * unit[i]
    status = Status.STAGNATED if all(run.resting for run in runs) else Status.MAX_STEPS
    status = Status.BUDGET if rtol is None else Status.CONVERGED if reached else status
    rests = status in (Status.CONVERGED, Status.STAGNATED) and doubted_noise(A) > 0
    if rests and rtol is not None and not all(run.below(rtol) for run in runs):
        status = Status.WITHIN_NOISE
    return MatrixFunctionResult(
        value=values[:, 0] if is_vector else values,
        errors=errors[0] if is_vector else errors,
        bounds=bounds[0] if is_vector else bounds,
        num_steps=tuple(steps),
        num_matvecs=spent,
        status=status,
        product_noise=product_noise(A) or None,
    )


def _iterate(
    process: LanczosProcess,
    runs: list[_Run],
    limit: int,
    rtol: float | None,
    callback: Callable[[int, str], None] | None,
) -> None:
    """Grow all runs until each is accurate enough or at its end."""
    first = limit - 5 if rtol is None else 0  # a budget is judged once, by its last steps
    for step in range(limit):
        process.step()
        for i, run in enumerate(runs):
            late = step >= first or process.beta[i][-1] == 0
            if late and len(process.alpha[i]) > run.num_steps:
                run.update(process.alpha[i], process.beta[i])
                run.resting = run.at_rounding or (rtol is not None and run.below(rtol))
                process.resting[i] = process.resting[i] or (rtol is not None and run.resting)
        if callback is not None:
            worst = max(run.error / run.size if run.size > 0 else run.error for run in runs)
            callback(process.num_matvecs, f"relative error {worst:.2g}")
        if process.over:
            return


class _Run:
    """f(T) e_1 |v| as T grows, and how far it is from its limit; `h` are the coefficients in the basis."""

    def __init__(self, f: str | _Entrywise, lower: float | None, norm: float, rounding: float) -> None:
        self.f, self.lower, self.norm, self.rounding = f, lower, norm, rounding
        self.h = self.theta = torch.zeros(0, dtype=torch.float64)
        self.changes: list[float] = []
        self.num_steps, self.size, self.error, self.bound = 0, 0.0, math.inf, math.inf
        self.at_rounding = self.resting = False

    def below(self, rtol: float) -> bool:
        return self.error <= rtol * self.size

    def update(self, alpha: list[float], beta: list[float]) -> None:
        """Take one step more into account; the last of `beta` couples to what comes next."""
        theta_, S_ = scipy.linalg.eigh_tridiagonal(alpha, beta[:-1])
        theta, S = torch.from_numpy(theta_), torch.from_numpy(S_)
        values = self._values(theta)
        h = self.norm * (S @ (values * S[0]))
        previous = torch.cat([self.h, torch.zeros(len(h) - len(self.h), dtype=h.dtype)])
        self.changes.append(float((h - previous).norm()))
        self.h, self.theta, self.num_steps, self.size = h, theta, len(alpha), float(h.norm())
        floor = self._floor(theta, values)
        exhausted = beta[-1] == 0
        bound = 0.0 if exhausted else self._bound(theta, beta, h)
        error = bound if math.isfinite(bound) else _extrapolated(self.changes)
        self.error, self.bound, self.at_rounding = error + floor, bound + floor, error <= floor

    def allow(self, noise: float) -> None:
        """Add to the error what another matrix does, off by this share of |A|."""
        if noise > 0:
            changed = self._changed(self.theta, self._values(self.theta), noise)
            self.error, self.bound = self.error + changed, self.bound + changed

    def _floor(self, theta: Tensor, values: Tensor) -> float:
        """Return what rounding in values and in A may add to the error."""
        of_values = self.norm * self.rounding / 10 * float(values.abs().max())
        return of_values + self._changed(theta, values, self.rounding, at_once=True)

    def _changed(self, theta: Tensor, values: Tensor, share: float, *, at_once: bool = False) -> float:
        """Return |v| |f'| times this share of |A|; `at_once` takes f' at the eigenvalues seen, not as far beyond."""
        perturbation = share * float(theta.abs().max())  # of A, as good as
        if isinstance(self.f, str):
            beyond = 0.0 if at_once else perturbation
            x = theta + beyond if self.f == "exp" else theta.clamp_min(0) if self.f == "sqrt" else theta.abs() - beyond
            inside = self.f not in _DEFINITE or bool((x > 0).all())
            slope = float(_FUNCTIONS[self.f][1](x).abs().max()) if inside else math.inf
        else:
            slope = float((values.diff() / theta.diff()).abs().max()) if len(theta) > 1 else 0.0
        moved = perturbation * slope if perturbation > 0 else 0.0
        return self.norm * (min(moved, perturbation**0.5) if self.f == "sqrt" else moved)

    def _values(self, theta: Tensor) -> Tensor:
        largest = float(theta.abs().max())
        if not isinstance(self.f, str):
            values = self.f(theta)
            if not isinstance(values, Tensor) or values.shape != theta.shape or not bool(values.isfinite().all()):
                raise InputError(
                    "f must return a finite value for every eigenvalue, but does not between "
                    f"{float(theta[0]):.4g} and {float(theta[-1]):.4g}, where A + damping I has some; check its "
                    "domain, or raise damping."
                )
            return values.to(torch.float64)
        level = self.rounding * largest
        lowest = float(theta.abs().min()) if self.f == "inv" else float(theta[0])
        if (self.f in _DEFINITE and not lowest > level) or (self.f == "sqrt" and lowest < -level):
            need = {"inv": "invertible", "sqrt": "positive semi-definite"}.get(self.f, "positive definite")
            raise InputError(
                f"f = {self.f!r} needs A + damping I to be {need}, but it has an eigenvalue at or below {lowest:.4g} "
                f"(the largest is about {largest:.4g}); raise damping{', or take minres' * (self.f == 'inv')}."
            )
        return _FUNCTIONS[self.f][0](theta.clamp_min(0) if self.f == "sqrt" else theta)

    def _bound(self, theta: Tensor, beta: list[float], h: Tensor) -> float:
        """Return the bound that follows from `lower`; infinite without."""
        if self.lower is None or not isinstance(self.f, str) or self.f == "exp":
            return math.inf
        if self.f == "inv":
            return beta[-1] * abs(float(h[-1])) / self.lower
        log_t = torch.linspace(math.log(float(theta[0])) - 60, math.log(float(theta[-1])) + 60, 601).double()
        t = log_t.exp()
        log_r = sum(map(math.log, beta)) - torch.log(theta[:, None] + t).sum(dim=0)
        integrand = _FUNCTIONS[self.f][2](t) * t / (self.lower + t) * log_r.exp()  # t for dt = t d log t
        return self.norm * float(torch.trapezoid(integrand, log_t))


def _extrapolated(changes: list[float]) -> float:
    """Return the error that is left if changes go on falling as they did of late, with a margin."""
    if len(changes) < 4:
        return math.inf
    late, early = math.hypot(*changes[-2:]), math.hypot(*changes[-4:-2])
    if late == 0:
        return 0.0
    rate = math.sqrt(min(late / early, 1.0)) if early > 0 else 1.0
    return _SAFETY * late / (1 - min(rate, 0.99))
