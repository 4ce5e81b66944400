"""Symmetric positive definite systems by preconditioned conjugate gradients, several right-hand sides at once.

Every column has coefficients of its own and leaves the products when it is solved. Along a direction of no positive
curvature the quadratic model has no minimum: the column ends there and the direction is returned. For optimizers that
need a good step rather than a solution there are rules on the model's values, and iterates kept on the way.

Reference: Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems; Martens (2010), Deep
learning via Hessian-free optimization, for the use in optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import Systems, indefinite
from curvature.linalg.base.validate import non_finite_message
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import Status
from curvature.results.solves import KeptIterate, SolveResult

_STATE = ("models", "next_kept", "met", "direction", "curvature")


@numerics
def cg(
    A: AnyMatrix,
    B: Tensor,
    *,
    matrix: MatrixName = "hessian",
    damping: float = 0.0,
    preconditioner: Any = None,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    stop: Callable[[Sequence[float]], bool] | None = None,
    keep: float | None = None,
    reorthogonalise: bool = False,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> SolveResult:
    """Solve (A + damping I) x = b for every column b of B, to residuals |b - (A + damping I) x| <= max(rtol |b|, atol).

    A singular matrix is no obstacle if b is in its range; the solution is then the shortest one (without preconditioner
    and x0). If b is not, or A + damping I is indefinite, a direction d with d'(A + damping I) d <= 0, beyond what
    rounding can tell from zero, ends the column: status NEGATIVE_CURVATURE, x as before, d in `direction`. What falls
    at every step is the model x'(A + damping I) x / 2 - b'x, not the residual, which may end larger than it began where
    b is not in the range: `minres` keeps it down, and `solve` goes over to that.

    Steps needed: about sqrt(kappa) log(2 / rtol) / 2 for a condition number kappa, fewer for clustered eigenvalues.
    Cost: a product a step and open column, one a column to recompute residuals, one a column for x0. Memory: 6 blocks
    of B's size, and those of `keep` and `reorthogonalise`.

    Args:
        B: right-hand sides, (n,) or (n, k).
        damping: added to A's diagonal; units of A.
        preconditioner: symmetric positive definite P near A + damping I, as an object whose `@` applies P^-1 to (n, k).
        x0: starts, of B's shape. Default: zero.
        rtol: tolerance of the residuals relative to |b|; positive.
        atol: tolerance of the residuals in units of b, where that is larger.
        max_iterations: most steps a column. Default: 10 n, at least 1000.
        stop: a rule that ends a column early, given the values of phi = x'(A + damping I) x / 2 - b'x after 0, 1, ...
            steps, e.g. `RelativeProgress()`.
        keep: keep the iterates after ceil(keep^j) steps, j = 0, 1, ..., to go back to; above 1, e.g. 1.3. Columns that
            are done stand as they are; steps after a recomputed residual are not kept.
        reorthogonalise: keep residuals orthogonal to all earlier ones, for ill-conditioned matrices: fewer steps, but
            2 vectors more a step and column, one without preconditioner.

    Returns:
        Solutions with recomputed residuals. With a status other than CONVERGED, what was reached.

    Raises:
        InputError: for arguments out of range, or a preconditioner that is not positive definite.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> result = cg(A, torch.ones(3), rtol=1e-4)
        >>> result.x.round(decimals=2), result.num_iterations, result.num_matvecs
        (tensor([1.0000, 0.5000, 0.2500]), (3,), 4)
    """
    saved = open_run("cg", locals())
    if keep is not None and not (keep > 1 and math.isfinite(keep)):
        raise InputError(f"keep must be a finite growth factor above 1, got {keep}.")
    systems = Systems(
        as_matrix(A, matrix),
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
    run = _Run(systems, stop, keep, reorthogonalise)
    systems.solve(run.iterate, run.load_state_dict)
    return systems.solution(
        model_history=systems.ragged(run.models, 2),
        kept=tuple(run.kept),
        direction=systems.shaped(run.direction) if run.met else None,
        curvature=systems.shaped(run.curvature) if run.met else None,
    )


class _Run:
    def __init__(
        self, s: Systems, stop: Callable[[Sequence[float]], bool] | None, keep: float | None, reorthogonalise: bool
    ) -> None:
        self.stop, self.keep, self.reorthogonalise = stop, keep, reorthogonalise
        self.models = [[value] for value in _model(s.B, s.R, s.X).double().tolist()]
        self.kept: list[KeptIterate] = []
        self.next_kept = 1
        self.met = False
        self.direction = torch.zeros_like(s.B)
        self.curvature = torch.full_like(s.scale, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return what steps change."""
        kept = [(each.step, each.x) for each in self.kept]
        return {**{name: getattr(self, name) for name in _STATE}, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.kept = [KeptIterate(step=step, x=x) for step, x in state["kept"]]

    def iterate(self, s: Systems, columns: list[int]) -> dict[str, Any]:
        active = list(columns)
        past: list[tuple[Tensor, Tensor, Tensor]] = []
        X, R, B = s.X[:, active], s.R[:, active], s.B[:, active]
        P, rho_old = torch.zeros_like(R), R.new_ones(R.shape[1])
        eps, size = torch.finfo(R.dtype).eps, R.new_zeros((), dtype=torch.float64)
        limit = s.limit - max(s.steps[i] for i in active)
        first = 1
        if (kept := s.saved.kept()) is not None:
            systems, own, (first, active, X, R, P, rho_old, size, past) = kept
            s.load_state_dict(systems)
            self.load_state_dict(own)
            B = s.B[:, active]
        for step in range(first, limit + 1):
            if step > first:
                s.saved.keep(partial(self._state, s, step, active, X, R, P, rho_old, size, past))
            Z = s.precondition(R)
            rho = (R * Z).sum(dim=0)
            if self.reorthogonalise:
                past.append((R, Z, rho))
            P = Z + (rho / rho_old if step > 1 else 0) * P
            Q = s.multiply(P)
            curvature = (P * Q).sum(dim=0)
            # in float64, squares of float32 neither vanish nor overflow, and nobody waits for the device
            lengths, images = (torch.linalg.vector_norm(X, dim=0, dtype=torch.float64) for X in (P, Q))
            size = torch.maximum(size, (images / lengths).max())  # approaches |A|
            positive = curvature > eps * size * lengths**2
            alpha = torch.where(positive, rho / curvature, 0)
            X, R, rho_old = X + alpha * P, R - alpha * Q, rho
            R = _orthogonal(R, past)
            norms = torch.linalg.vector_norm(R, dim=0)
            facts = torch.stack([norms, _model(B, R, X), rho, curvature, positive.to(R)])
            ended = self._ended(s, active, facts.double().tolist(), last=step == limit)
            self._keep(s, active, X)
            if not any(ended):
                s.report(active)
                continue
            self._note(s, active, P, lengths, curvature)
            done = [j for j, over in enumerate(ended) if over]
            s.X[:, [active[j] for j in done]] = X[:, done]
            left = [j for j, over in enumerate(ended) if not over]
            active = [active[j] for j in left]
            s.report(active)
            if not active:
                break
            X, R, B, P, rho_old = X[:, left], R[:, left], B[:, left], P[:, left], rho_old[left]
            past = [(r[:, left], z[:, left], c[left]) for r, z, c in past]
        else:
            for i in columns if limit <= 0 else []:
                s.statuses[i] = Status.MAX_ITERATIONS
        self.next_kept = 0  # iterates of a second round have no common step
        return self.state_dict()

    def _state(self, s: Systems, *step: Any) -> tuple[Any, ...]:
        return s.state_dict(), self.state_dict(), step

    def _ended(self, s: Systems, active: list[int], facts: list[list[float]], *, last: bool) -> list[bool]:
        """Write down the step and say which columns are over."""
        ended = []
        for i, norm, model, rho, curvature, positive in zip(active, *facts, strict=True):
            if not all(map(math.isfinite, (norm, model, rho, curvature))):
                raise NonFiniteError(non_finite_message(s.num_matvecs))
            if rho <= 0:
                raise indefinite(rho)
            if positive:
                s.steps[i] += 1
                s.history[i].append(norm)
                self.models[i].append(model)
            status = None
            if not positive:
                status = Status.NEGATIVE_CURVATURE
            elif norm <= s.tolerance[i]:
                status = Status.CONVERGED
            elif self.stop is not None and self.stop([m * s.scales[i] ** 2 for m in self.models[i]]):
                status = Status.STOPPED
            elif last:
                status = Status.MAX_ITERATIONS
            ended.append(status is not None)
            s.statuses[i] = status or s.statuses[i]
        return ended

    def _note(self, s: Systems, active: list[int], P: Tensor, lengths: Tensor, curvature: Tensor) -> None:
        """Keep directions of no positive curvature."""
        for j, i in enumerate(active):
            if s.statuses[i] is Status.NEGATIVE_CURVATURE:
                self.met = True
                self.direction[:, i] = P[:, j] / lengths[j]
                self.curvature[i] = curvature[j] / lengths[j] ** 2

    def _keep(self, s: Systems, active: list[int], X: Tensor) -> None:
        step = max(s.steps[i] for i in active)
        if self.keep is None or self.next_kept == 0 or step < self.next_kept:
            return
        all_columns = s.X.clone()
        all_columns[:, active] = X
        self.kept.append(KeptIterate(step=step, x=s.shaped(all_columns * s.scale)))
        self.next_kept = next(k for j in count() if (k := math.ceil(self.keep**j)) > step)


def _orthogonal(R: Tensor, past: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return R orthogonal to earlier residuals r and their preconditioned twins z, r_i'z_j = rho_i delta_ij."""
    for _ in range(2):  # twice is enough
        for r, z, rho in past:
            R = R - r * ((z * R).sum(dim=0) / rho)
    return R


def _model(B: Tensor, R: Tensor, X: Tensor) -> Tensor:
    """Return x'A x / 2 - b'x for every column, from r = b - A x."""
    return -((B + R) * X).sum(dim=0) / 2
