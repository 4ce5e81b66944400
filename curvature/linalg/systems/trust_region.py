"""The trust-region subproblem by truncated conjugate gradients (Steihaug and Toint).

The iterates of CG grow in norm; the first that would leave the region, or that follows a direction of no positive
curvature, is replaced by the point where its line meets the boundary. The step gains at least half of what the best
step gains if A is positive definite (Yuan, 2000), and never less than the steepest descent's best.

Reference: Steihaug (1983), The conjugate gradient method and trust regions in large scale optimization; Toint (1981);
Conn, Gould and Toint (2000), Trust-Region Methods, algorithm 7.5.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import (
    check_preconditioner,
    indefinite,
    powers_of_two,
    preconditioned,
    right_hand_sides,
    step_limit,
)
from curvature.linalg.base.validate import (
    check_square,
    check_tolerances,
    doubted_noise,
    non_finite_message,
    product_noise,
    working_dtype,
)
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.results.estimates import Status
from curvature.results.solves import SubproblemResult

_HUGE = 1e150


@numerics
def trust_region(
    A: AnyMatrix,
    g: Tensor,
    radius: float,
    *,
    matrix: MatrixName = "hessian",
    preconditioner: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    callback: Callable[[int, str], None] | None = None,
) -> SubproblemResult:
    """Make g's + s'A s / 2 small over |s| <= radius, |s|^2 = s'P s for a preconditioner P.

    Inside the region the step ends with |g + A s| <= max(rtol |g|, atol) in the norm of P^-1. On the boundary it is
    not the best there is: `gltr` goes on. `multiplier` is then -s'(g + A s) / |s|^2, the one that leaves
    the smallest residual.

    Cost: a product a step. Memory: 6 vectors.

    Args:
        A: symmetric, (n, n), of any signature. Its symmetry is not checked.
        g: (n,).
        radius: positive; units of s.
        preconditioner: symmetric positive definite P near A, as an object whose `@` applies P^-1 to (n, k).
        rtol: tolerance of the model's gradient relative to |g|; positive.
        atol: tolerance of the model's gradient in units of g, where that is larger.
        max_iterations: most steps. Default: 10 n, at least 1000.

    Raises:
        InputError: for arguments out of range, or a preconditioner that is not positive definite.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, -1.0]))
        >>> result = trust_region(A, torch.tensor([3.0, 4.0]), 10.0)
        >>> result.status.name, round(result.step_norm, 4), result.curvature < 0
        ('BOUNDARY', 10.0, True)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    check_tolerances(rtol, atol)
    check_positive("radius", radius)
    check_preconditioner(preconditioner, n)
    g = check_gradient(A, g)
    limit = step_limit(max_iterations, n)
    unit = float(powers_of_two(g[:, None]))  # of g and of s: no square underflows
    g, radius, atol = g / unit, radius / unit, atol / unit
    r, s = g, torch.zeros_like(g)
    z = preconditioned(preconditioner, r[:, None])[:, 0]
    p, rho = -z, (r * z).sum().double()  # steps may be so long that their squares overflow
    squared, crossed, length = torch.zeros_like(rho), torch.zeros_like(rho), rho  # |s|^2, s'P p, |p|^2
    start = float(rho)
    if start < 0 or (start == 0 and bool(g.any())):
        raise indefinite(start)
    tolerance = max(rtol * start**0.5, atol)
    status = Status.CONVERGED if start**0.5 <= tolerance else Status.MAX_ITERATIONS
    size, smallest, eps = rho.new_zeros(()), math.nan, torch.finfo(working_dtype(A)).eps
    steps = 0
    while status is Status.MAX_ITERATIONS and steps < limit:
        q = (A @ p.to(A.dtype)).to(p)
        steps += 1
        curvature = (p * q).sum().double()
        squared_length = (p * p).sum().double()
        norm = torch.linalg.vector_norm(q, dtype=torch.float64)
        size = torch.maximum(size, norm / squared_length.sqrt())  # approaches |A|
        alpha = rho / curvature
        r_next = r + alpha * q
        z = preconditioned(preconditioner, r_next[:, None])[:, 0]
        rho_next = (r_next * z).sum().double()
        reached = squared + 2 * alpha * crossed + alpha**2 * length
        facts = torch.stack([curvature, reached, rho_next, length, squared, crossed, size, squared_length])
        c, end, rho_end, pp, ss, sp, norm, plain = facts.double().tolist()
        if not math.isfinite(c):
            raise NonFiniteError(non_finite_message(steps))
        smallest = min(c / pp, smallest) if steps > 1 else c / pp
        if c <= eps * norm * plain or not end < radius * radius:
            tau = _to_boundary(ss, sp, pp, radius)
            s, r, status = s + tau * p, r + tau * q, Status.BOUNDARY
            break
        if rho_end < 0:
            raise indefinite(rho_end)
        s, r = s + alpha * p, r_next
        if callback is not None:
            callback(steps, f"model gradient {unit * rho_end**0.5:.2g}, step {unit * end**0.5:.2g}")
        if rho_end**0.5 <= tolerance:
            status = Status.CONVERGED
        beta = rho_next / rho
        p, crossed, length = beta * p - z, beta * (crossed + alpha * length), rho_next + beta**2 * length
        rho, squared = rho_next, reached
    on_boundary = status is Status.BOUNDARY
    z = preconditioned(preconditioner, r[:, None])[:, 0]
    model, rs, rho = torch.stack([((g + r) * s).sum() / 2, (r * s).sum(), (r * z).sum()]).double().tolist()
    norm = radius if on_boundary else float(squared) ** 0.5
    multiplier = max(-rs / norm / norm, 0.0) if on_boundary else 0.0
    residual = max(rho + 2 * multiplier * rs + (multiplier * norm) * (multiplier * norm), 0.0) ** 0.5
    residual, status = within_noise(A, residual, float(size * s.norm()), tolerance, status)
    return SubproblemResult(
        step=s * unit,
        step_norm=norm * unit,
        model_decrease=max(-model, 0.0) * unit**2,
        multiplier=multiplier,
        on_boundary=on_boundary,
        hard_case=False,
        curvature=smallest,
        residual_norm=residual * unit,
        num_iterations=steps,
        num_matvecs=steps,
        status=status,
        product_noise=product_noise(A) or None,
    )


def within_noise(
    A: MatrixLike, residual: float, moved: float, tolerance: float, status: Status
) -> tuple[float, Status]:
    """Return the residual with the rounding error of products, `moved` being |A| |s|, and WITHIN_NOISE for it."""
    if not (noise := doubted_noise(A)):
        return residual, status
    with_noise = residual + noise * moved
    return with_noise, Status.WITHIN_NOISE if status.ok and residual <= tolerance < with_noise else status


def _to_boundary(ss: float, sp: float, pp: float, radius: float) -> float:
    """Return the tau >= 0 with |s + tau p| = radius, in the form that does not cancel."""
    if radius > _HUGE:
        return radius / math.sqrt(pp)  # where s is lost beside it, and its square would overflow
    missing = max(radius**2 - ss, 0.0)
    root = math.sqrt(sp**2 + pp * missing)
    return missing / (sp + root) if sp > 0 else (root - sp) / pp


def check_gradient(A: MatrixLike, g: Tensor) -> Tensor:
    """Return g as a vector in the working dtype."""
    if isinstance(g, Tensor) and g.ndim == 2:
        raise InputError(f"g must be a vector ({A.shape[0]},), got {tuple(g.shape)}; one subproblem is solved a call.")
    return right_hand_sides(A, g, A.shape[0])[0][:, 0]


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive and finite, got {value}.")
