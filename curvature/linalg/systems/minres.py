"""Symmetric systems, indefinite or singular, by MINRES: the smallest residual in every Krylov space.

The Lanczos vectors reduce A to a tridiagonal T, Givens rotations reduce T to triangular form as it grows, and x is
updated by short recurrences. Where b is not in the range of A the residual ends in A's null space. All of x that lies
there is then a multiple of that residual r: taking it out, x - (x'r / r'r) r, leaves the shortest least-squares
solution.

Reference: Paige and Saunders (1975), Solution of sparse indefinite systems of linear equations; Choi, Paige and
Saunders (2011), MINRES-QLP, for singular systems and stopping; Liu, Milzarek and Roosta (2023), arXiv 2309.17096, for
the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import Systems, indefinite
from curvature.linalg.base.validate import check_range, check_square, non_finite_message, rounding_level
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import Status
from curvature.results.solves import SolveResult


@numerics
def minres(
    A: AnyMatrix,
    B: Tensor,
    *,
    matrix: MatrixName = "hessian",
    damping: float = 0.0,
    preconditioner: Any = None,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    null_rtol: float | None = None,
    max_iterations: int | None = None,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> SolveResult:
    """Solve (A + damping I) x = b for every column b of B, or minimise |b - (A + damping I) x| where there is none.

    A column ends as CONVERGED with |r| <= max(rtol |b|, atol), or as LEAST_SQUARES with |A r| <= eps^(1/2) |A| |r|, r
    and A r multiplied anew: b has a part outside A's range. x is then the shortest least-squares solution (with x0: the
    one nearest to x0), and `gradient_norms` tells |A r|. With a preconditioner what is minimised is r'P^-1 r, the
    gradient is A P^-1 r, and x is some solution of that. Where rounding prevents both, the column ends as STAGNATED
    with the best x that was reached; its residual is never larger than that of the start.

    Steps needed: about sqrt(kappa) for definite matrices, kappa for spectra on both sides of zero. Cost and memory: as
    `cg`, with 14 blocks of B's size; two products more for a column without solution.

    Arguments and errors are those of `cg`. Eigenvalues below the share `null_rtol` of |A| count as zero once they are
    all that is left of the residual. Default: eps^(2/3), 4e-11 in float64. Where rounding lets |A r| rise again before
    that, from below eps^(1/2) |A| |r| and with |r| at rest, the column ends as well, at its least |A r|.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, -2.0, 0.0]))
        >>> result = minres(A, torch.ones(3))
        >>> result.x.round(decimals=3).abs(), result.status.name
        (tensor([1.0000, 0.5000, 0.0000]), 'LEAST_SQUARES')
    """
    saved = open_run("minres", locals())
    A = as_matrix(A, matrix)
    check_square(A)
    if null_rtol is None:
        null_rtol = torch.finfo(torch.promote_types(A.dtype, torch.float32)).eps ** (2 / 3)
        null_rtol = max(null_rtol, rounding_level(A))
    if not 0 < null_rtol < 1:
        raise InputError(f"null_rtol must be in (0, 1), got {null_rtol}.")
    systems = Systems(
        A,
        B,
        damping=damping,
        preconditioner=preconditioner,
        x0=x0,
        rtol=rtol,
        atol=atol,
        max_iterations=max_iterations,
        callback=callback,
        saved=saved,
    )
    start = systems.X.clone()
    best, least = systems.X.clone(), list(systems.norms)
    size, gradients = systems.scale.new_zeros(()), torch.full_like(systems.scale, torch.nan)
    level, coarse = null_rtol, torch.finfo(systems.dtype).eps ** (1 / 3)
    columns: list[int] | None = None
    while columns is None or columns:
        size = _run(systems, columns, size, level)
        unproven = _unproven(systems, start, size, gradients)
        columns = _improved(systems, best, least, unproven)
        if not columns and level < coarse:  # rounding hid the null space: look for it less closely
            columns, level = [i for i in unproven if systems.steps[i] < systems.limit], coarse
    known = Status.LEAST_SQUARES in systems.statuses
    return systems.solution(gradient_norms=systems.shaped(gradients) if known else None)


def _run(s: Systems, columns: list[int] | None, size: Tensor, null_rtol: float) -> Tensor:
    """Iterate; return the size of A as far as the columns of T have shown."""
    found = [size]
    s.solve(lambda s, active: _iterate(s, active, null_rtol), found.append, columns)
    return torch.stack(found).max()


def _unproven(s: Systems, start: Tensor, size: Tensor, gradients: Tensor) -> list[int]:
    """Return the columns that claim a least-squares solution although |A r| as multiplied is not small.

    The others are made the shortest solution by taking out what they hold of the null space, where that does not cost
    residual; `gradients` takes their |A r|.
    """
    places = [i for i, status in enumerate(s.statuses) if status is Status.LEAST_SQUARES and gradients[i].isnan()]
    if not places:
        return []
    R = s.R[:, places]
    Y = s.precondition(R)
    G = s.multiply(Y)
    slopes, norms = torch.linalg.vector_norm(G, dim=0), torch.linalg.vector_norm(R, dim=0)
    slope_sizes = (G * s.precondition(G)).sum(dim=0).clamp_min(0).sqrt()
    proven = (slope_sizes <= torch.finfo(R.dtype).eps ** 0.5 * size * (R * Y).sum(dim=0).clamp_min(0).sqrt()).tolist()
    share = (R * (s.X[:, places] - start[:, places])).sum(dim=0) / norms.square()
    if s.preconditioner is not None:
        share = torch.zeros_like(share)
    shortened = R + share * G
    moved = torch.linalg.vector_norm(shortened, dim=0)
    for j, i in enumerate(places):
        if proven[j]:
            gradients[i] = slopes[j] * s.scale[i]
            if float(moved[j]) <= float(norms[j]) * (1 + torch.finfo(R.dtype).eps ** 0.5):
                s.X[:, i] -= share[j] * R[:, j]
                s.R[:, i], s.norms[i] = shortened[:, j], float(moved[j])
    return [i for j, i in enumerate(places) if not proven[j]]


def _improved(s: Systems, best: Tensor, least: list[float], unproven: list[int]) -> list[int]:
    """Return the unproven columns that come closer by starting over; take the others, and any worse, to their best."""
    again = []
    for i, norm in enumerate(s.norms):
        halved = norm <= least[i] / 2
        if norm <= least[i]:
            best[:, i], least[i] = s.X[:, i], norm
        elif i in unproven or norm > (1 + torch.finfo(best.dtype).eps ** 0.5) * least[i]:
            s.X[:, i], s.norms[i], s.statuses[i] = best[:, i], least[i], Status.STAGNATED
            s.R[:, i] = s.B[:, i] - s.multiply(best[:, i : i + 1])[:, 0]
        if i in unproven:
            s.statuses[i] = Status.STAGNATED
            if halved and s.steps[i] < s.limit:
                again.append(i)
    return again


class _State(NamedTuple):
    """What a step needs of the one before, columns last; letters of Paige and Saunders."""

    X: Tensor
    R: Tensor  # b - A x
    X_best: Tensor  # where |A r| / |r| was smallest ...
    R_best: Tensor
    least: Tensor  # ... and how small
    r1: Tensor  # P beta_(j-1) v_(j-1) ...
    r2: Tensor  # ... and P beta_j v_j
    y: Tensor  # P^-1 r2
    w1: Tensor
    w2: Tensor
    beta: Tensor
    beta_old: Tensor
    dbar: Tensor
    epsilon: Tensor
    phibar: Tensor
    cs: Tensor
    sn: Tensor

    def select(self, columns: list[int]) -> _State:
        return _State(*(part[..., columns] for part in self))


def _iterate(s: Systems, columns: list[int], null_rtol: float) -> Tensor:
    active, limit = list(columns), s.limit - max(s.steps[i] for i in columns)
    state = _start(s, active)
    size = state.beta.new_zeros(())  # of columns of T: approaches |A|
    for i in columns:
        s.statuses[i] = Status.MAX_ITERATIONS
    first = 0
    if (kept := s.saved.kept()) is not None:
        systems, (first, active, parts, size) = kept
        s.load_state_dict(systems)
        state = _State(*parts)
    for i in range(first, limit):
        if i > first:
            s.saved.keep(partial(_kept, s, i, active, tuple(state), size))
        state, size, null, squared = _step(s, state, size, null_rtol)
        norms = torch.linalg.vector_norm(state.R, dim=0)
        facts = torch.stack([norms, null.to(norms), state.beta, squared, size.expand_as(norms)]).double().tolist()
        left = []
        for j, (i, norm, is_null, beta, square, largest) in enumerate(zip(active, *facts, strict=True)):
            if not (math.isfinite(norm) and math.isfinite(square)):
                raise NonFiniteError(non_finite_message(s.num_matvecs))
            _check_definite(square, largest)
            s.steps[i] += not is_null
            s.history[i] += [] if is_null else [norm]
            if norm <= s.tolerance[i]:
                s.statuses[i] = Status.CONVERGED
            elif is_null:
                s.statuses[i] = Status.LEAST_SQUARES
            elif beta == 0:
                s.statuses[i] = Status.CONVERGED  # Krylov space exhausted: what is left is rounding
            else:
                left.append(j)
        if len(left) < len(active):
            s.X[:, active] = state.X
            active, state = [active[j] for j in left], state.select(left)
        s.report(active)
        if not active:
            return size
    s.X[:, active] = state.X
    return size


def _kept(s: Systems, *step: Any) -> tuple[Any, ...]:
    return s.state_dict(), step


def _start(s: Systems, active: list[int]) -> _State:
    R = s.R[:, active]
    y = s.precondition(R)
    squared = (R * y).sum(dim=0)
    for value in squared.tolist():
        _check_definite(value if value != 0 else -1.0, 0.0)
    beta = squared.sqrt()
    zero, nothing = torch.zeros_like(beta), torch.zeros_like(R)
    X, one, far = s.X[:, active], torch.ones_like(beta), torch.full_like(beta, torch.inf)
    return _State(X, R, X, R, far, nothing, R, y, nothing, nothing, beta, one, zero, zero, beta, -one, zero)


def _step(s: Systems, t: _State, size: Tensor, null_rtol: float) -> tuple[_State, Tensor, Tensor, Tensor]:
    """Return the next state, the size of A, which columns' residuals were in the null space, and beta^2 as computed."""
    v = t.y / t.beta
    u = check_range(s.multiply(v), s.num_matvecs, first=False) - (t.beta / t.beta_old) * t.r1
    alpha = (v * u).sum(dim=0)
    u = u - (alpha / t.beta) * t.r2
    y = s.precondition(u)
    squared = (u * y).sum(dim=0)
    beta = squared.clamp_min(0).sqrt()
    size = torch.maximum(size, torch.hypot(alpha, beta).max())
    beta = torch.where(beta <= rounding_level(s.A) * size, 0, beta)
    delta, gbar = t.cs * t.dbar + t.sn * alpha, t.sn * t.dbar - t.cs * alpha
    epsilon, dbar = t.sn * beta, -t.cs * beta
    ratio = torch.hypot(gbar, dbar)  # |A r| / |r| of the r before this step
    better = ratio < t.least
    X_best, R_best = torch.where(better, t.X, t.X_best), torch.where(better, t.R, t.R_best)
    least = torch.minimum(ratio, t.least)
    null = (least <= null_rtol * size) | _turned(ratio, least, size, t.R, R_best)
    gamma = torch.where(null, 1, torch.hypot(gbar, beta))
    cs, sn = gbar / gamma, beta / gamma
    phi, phibar = torch.where(null, 0, cs * t.phibar), sn * t.phibar
    w = (v - t.epsilon * t.w1 - delta * t.w2) / gamma
    R = sn**2 * t.R - (phibar * cs / torch.where(beta > 0, beta, 1)) * u
    X, R = torch.where(null, X_best, t.X + phi * w), torch.where(null, R_best, R)
    following = _State(X, R, X_best, R_best, least, t.r2, u, y, t.w2, w, beta, t.beta, dbar, epsilon, phibar, cs, sn)
    return following, size, null, squared


def _turned(ratio: Tensor, least: Tensor, size: Tensor, R: Tensor, R_best: Tensor) -> Tensor:
    """Whether |A r| rises again though |r| stays, as rounding has it once r is in the null space."""
    small = torch.finfo(R.dtype).eps ** 0.5
    stays = torch.linalg.vector_norm(R, dim=0) >= (1 - small) * torch.linalg.vector_norm(R_best, dim=0)
    return (least <= small * size) & (ratio > 10 * least) & stays


def _check_definite(squared: float, size: float) -> None:
    """Refuse a preconditioner with r'P^-1 r < 0 beyond rounding."""
    if squared < -1e-5 * size**2 or (size == 0 and squared < 0):
        raise indefinite(squared)
