"""Trust-region and cubic subproblems in the Lanczos space of the gradient: steps that are the best of their space.

With the Lanczos decomposition A V = W T + ..., V'P V = I and P^-1 g = gamma v_1, a step s = V h has the model
gamma h_1 + h'T h / 2 and the norm |s|_P = |h|. This small problem is solved exactly, multiplier and hard case included,
and s satisfies (A + lambda P) s = -g to a residual beta_m |h_m|.

What g's Krylov space does not hold is not seen: an eigenvector of negative curvature orthogonal to g, the hard case
proper. Once the step has converged, the basis can be continued from a random direction, which finds it.

Reference: Gould, Lucidi, Roma and Toint (1999), Solving the trust-region subproblem using the Lanczos method; Cartis,
Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained optimization, part I.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import scipy  # whose parts are imported when used
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import check_preconditioner, powers_of_two
from curvature.linalg.base.validate import check_square, check_tolerances, product_noise
from curvature.linalg.krylov._completeness import Bound, Chain
from curvature.linalg.krylov._lanczos_process import LanczosProcess
from curvature.linalg.systems._secular import SecularSolution, cubic_minimiser, trust_region_minimiser
from curvature.linalg.systems.trust_region import check_gradient, check_positive, trust_region, within_noise
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.results.estimates import Status
from curvature.results.solves import SubproblemResult

_MOST_STEPS = 200
_LOWER = 1e-3  # of |A|: what is lower than the lowest eigenvalue found by more than this must not be missed ...
_MISSED = 0.01  # ... but with this probability


@numerics
def gltr(
    A: AnyMatrix,
    g: Tensor,
    radius: float,
    *,
    matrix: MatrixName = "hessian",
    preconditioner: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    generator: AnyGenerator | None = None,
    callback: Callable[[int, str], None] | None = None,
) -> SubproblemResult:
    """Minimise g's + s'A s / 2 over |s| <= radius, |s|^2 = s'P s, to |g + (A + lambda P) s| <= max(rtol |g|, atol).

    The residual is in the norm of P^-1. Inside the region the steps are those of CG; on the boundary the step is the
    best of the Krylov space, which `trust_region` is not.

    Cost: a product a step, 4 n m operations a step for the basis. Memory: a vector a step, two with a preconditioner.

    Arguments and errors are those of `trust_region`; `max_iterations` is 200 by default, n at most. With a generator,
    on A's device, or a seed, directions that g does not see are looked for from a random vector once the step has
    converged; the search ends when the lowest eigenpair has a residual below rtol |A| and an eigenvalue lower than it
    by max(rtol, 1e-3) |A| would have been missed with a probability of 1 % at most, which takes about as many products
    again. For g = 0 it starts there. Default: no such search, and a step of zero for g = 0.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, -1.0]))
        >>> result = gltr(A, torch.tensor([2.0, 0.0]), 2.0, generator=0)
        >>> result.step.abs().round(decimals=3), round(result.multiplier, 3), result.hard_case
        (tensor([1.0000, 1.7320]), 1.0, True)
    """
    check_positive("radius", radius)
    settings = (preconditioner, rtol, atol, max_iterations, generator, callback)
    return _in_lanczos_space(as_matrix(A, matrix), g, partial(trust_region_minimiser, radius=radius), 0.0, *settings)


@numerics
def cubic_subproblem(
    A: AnyMatrix,
    g: Tensor,
    sigma: float,
    *,
    matrix: MatrixName = "hessian",
    preconditioner: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    generator: AnyGenerator | None = None,
    callback: Callable[[int, str], None] | None = None,
) -> SubproblemResult:
    """Minimise g's + s'A s / 2 + sigma/3 |s|^3, |s|^2 = s'P s, to |g + (A + lambda P) s| <= max(rtol |g|, atol).

    Here lambda = sigma |s|. The weight sigma of the cube is positive, in units of A over units of s; below L / 2, L the
    Lipschitz constant of the Hessian, the model may promise too much. Other arguments, cost and errors are those of
    `gltr`.

    Examples:
        >>> result = cubic_subproblem(torch.zeros(2, 2), torch.tensor([3.0, 4.0]), 5.0)  # |s| = (|g| / sigma)^(1/2)
        >>> result.step.round(decimals=3), round(result.multiplier, 3)
        (tensor([-0.6000, -0.8000]), 5.0)
    """
    check_positive("sigma", sigma)
    settings = (preconditioner, rtol, atol, max_iterations, generator, callback)
    return _in_lanczos_space(as_matrix(A, matrix), g, partial(cubic_minimiser, sigma=sigma), sigma, *settings)


def _in_lanczos_space(
    A: MatrixLike,
    g: Tensor,
    minimiser: Callable[[Tensor, Tensor], SecularSolution],
    sigma: float,
    preconditioner: Any,
    rtol: float,
    atol: float,
    max_iterations: int | None,
    generator: AnyGenerator | None,
    callback: Callable[[int, str], None] | None,
) -> SubproblemResult:
    n = check_square(A)
    check_tolerances(rtol, atol)
    check_preconditioner(preconditioner, n)
    g = check_gradient(A, g)
    limit = min(n, _MOST_STEPS) if max_iterations is None else max_iterations
    if limit < 1:
        raise InputError(f"max_iterations must be at least 1, got {max_iterations}.")
    if generator is not None:
        generator = as_generator(generator, A.device)
    searching = not bool(g.any())
    if searching and generator is None:
        return trust_region(A, g, 1.0)
    unit = float(powers_of_two(g[:, None]))
    start = _direction(g, generator) if searching else g[:, None] / unit
    process = LanczosProcess(A, start, preconditioner=preconditioner)
    gamma = 0.0 if searching else process.start_norms[0] * unit
    tolerance = max(rtol * gamma, atol)
    while True:
        process.step()
        theta, S = _ritz(process)
        small = minimiser(theta, gamma * S[0])
        h = S @ small.y
        residual = process.loose(h)
        seen = not searching or _seen(process, theta, S, rtol)
        if callback is not None:
            callback(process.num_matvecs, f"residual {residual:.2g}, step {float(small.y.norm()):.2g}")
        converged = process.over or (residual <= tolerance and seen)
        if converged and generator is not None and not searching and process.num_matvecs < n:
            converged, searching = False, True
            if process.num_matvecs < limit:
                converged = not process.restart(_direction(g, generator)[:, 0])
        if converged or process.num_matvecs >= limit:
            break
    ended = Status.BOUNDARY if small.on_boundary else Status.CONVERGED
    length = float(small.y.norm())
    residual, ended = within_noise(A, residual, float(theta.abs().max()) * length, tolerance, ended)
    model = float((gamma * S[0] * small.y + theta * small.y.square() / 2).sum()) + sigma / 3 * length**3
    return SubproblemResult(
        step=process.combine([h])[:, 0],
        step_norm=length,
        model_decrease=max(-model, 0.0),
        multiplier=small.multiplier,
        on_boundary=small.on_boundary,
        hard_case=small.hard_case,
        curvature=float(theta[0]),
        residual_norm=residual,
        num_iterations=process.num_matvecs,
        num_matvecs=process.num_matvecs,
        status=ended if converged else Status.MAX_ITERATIONS,
        product_noise=product_noise(A) or None,
    )


def lowest_pair(A: MatrixLike, generator: torch.Generator, most: int) -> tuple[float, Tensor, float, bool]:
    """Return A's lowest Ritz value and vector from a random start, |A| as far as it was seen, and whether that is all.

    It is where an eigenvalue lower by 1e-3 |A| was missed with a probability of 1 % at most. `most` products are spent,
    fewer where the answer is known before.
    """
    n = check_square(A)
    g = torch.zeros(n, dtype=A.dtype, device=A.device)
    process = LanczosProcess(A, _direction(check_gradient(A, g), generator))
    seen = False
    while not seen and process.num_matvecs < most:
        process.step()
        theta, S = _ritz(process)
        seen = process.over or _seen(process, theta, S, _LOWER)
    return float(theta[0]), process.combine([S[:, 0]])[:, 0], float(theta.abs().max()), seen


def _seen(process: LanczosProcess, theta: Tensor, S: Tensor, rtol: float) -> bool:
    """Whether the lowest Ritz pair has converged, and the steps since the random start show that none is lower."""
    size, first = float(theta.abs().max()), process.cut or 0
    alphas, betas = process.alpha[0][first:], process.beta[0][first:]
    if not process.loose(S[:, 0]) <= rtol * size or not alphas or not all(betas):
        return False
    bound = Bound(-1.0, float(theta[0]) - max(rtol, _LOWER) * size)
    chain = Chain(bound, process.n - first, alphas=alphas, betas=betas)
    return chain.miss_probability() <= _MISSED


def _ritz(process: LanczosProcess) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of T, ascending, and its eigenvectors."""
    if process.cut is not None:
        return torch.linalg.eigh(process.projected())
    theta, S = scipy.linalg.eigh_tridiagonal(process.alpha[0], process.beta[0][:-1])
    return torch.from_numpy(theta), torch.from_numpy(S)


def _direction(g: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(len(g), 1, generator=generator, dtype=g.dtype, device=g.device)
