"""Damped least-squares problems by LSMR: min |b - J x|^2 + damping |x|^2 for a rectangular J and its transpose.

Golub and Kahan's bidiagonalisation of J from b is what Lanczos on J'J would give, without squaring J's condition
number; LSMR is MINRES on the normal equations in these coordinates, so |J'(b - J x) - damping x| falls at every step.

Reference: Fong and Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.systems import Columns, powers_of_two
from curvature.linalg.base.validate import check_range, non_finite_message, rounding_level
from curvature.linop import MatrixLike
from curvature.results.estimates import Status
from curvature.results.solves import SolveResult


@numerics
def lsmr(
    J: MatrixLike,
    B: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    callback: Callable[[int, str], None] | None = None,
) -> SolveResult:
    """Return argmin |b - J x|^2 + damping |x|^2 for every column b of B, the shortest x where there are several.

    A column ends with |J'(b - J x) - damping x| <= max(rtol |J'b|, atol), with a floor at rounding, 10 eps |J| |r|:
    the criterion of `cg` on (J'J + damping I) x = J'b, which the result satisfies too. `gradient_norms` and, for |b - J
    x|, `residual_norms` are recomputed; `residual_history` holds the first of these.

    Cost: a product with J and one with J' a step and open column, and two more at the end. Memory: 2 blocks of B's
    size, 4 of x's.

    Args:
        J: (m, n), with an attribute `T` for its transpose; tensors have it.
        B: right-hand sides, (m,) or (m, k).
        damping: of x'x, in units of J'J; not negative. It is the square of what SciPy calls `damp`.
        rtol: tolerance of the gradient relative to |J'b|; positive.
        atol: tolerance of the gradient in units of J'b, where that is larger.
        max_iterations: most steps a column. Default: 10 min(m, n), at least 1000.

    Raises:
        InputError: for arguments out of range, or a J without transpose.

    Examples:
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        >>> lsmr(J, torch.tensor([1.0, 2.0, 3.0])).x.round(decimals=3)
        tensor([2., 1.])
    """
    if len(J.shape) != 2 or 0 in J.shape or not J.dtype.is_floating_point:
        raise InputError(f"J must be a real matrix that is not empty, got shape {tuple(J.shape)}, {J.dtype}.")
    if not hasattr(J, "T"):
        raise InputError(f"J must have an attribute T, its transpose, but {type(J).__name__} has none.")
    if damping < 0:
        raise InputError(f"damping must not be negative, got {damping}.")
    run = _Run(J, J.T, B, damping=damping, rtol=rtol, atol=atol, max_iterations=max_iterations, callback=callback)
    run.iterate()
    return run.solution()


class _State(NamedTuple):
    """What a step needs of the one before, columns last; letters of Fong and Saunders."""

    X: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    hbar: Tensor
    alpha: Tensor
    alphabar: Tensor
    rho: Tensor
    rhobar: Tensor
    cbar: Tensor
    sbar: Tensor
    zetabar: Tensor

    def select(self, columns: list[int]) -> _State:
        return _State(*(part[..., columns] for part in self))


class _Run(Columns):
    def __init__(self, J: MatrixLike, T: MatrixLike, B: Tensor, **settings: Any) -> None:
        super().__init__(J, B, **settings)
        self.T = T
        self.rescale(powers_of_two(self.B))
        self.size = self.B.new_zeros(())

    def multiply(self, A: MatrixLike, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return (A @ X.to(A.dtype)).to(self.dtype)

    def iterate(self) -> None:
        G = check_range(self.multiply(self.T, self.B), self.B.shape[1])
        beta = torch.linalg.vector_norm(self.B, dim=0)
        self.X = torch.zeros_like(G)
        norms: list[float] = torch.linalg.vector_norm(G, dim=0).double().tolist()
        self.begin(norms, norms)
        active = [i for i, norm in enumerate(norms) if not norm <= self.tolerance[i]]
        if not active:
            return
        state = self._start(G[:, active], active, beta[active])
        for step in range(self.limit):
            state = self._step(state)
            gradients: list[float] = state.zetabar.abs().double().tolist()
            left = []
            for j, (i, gradient) in enumerate(zip(active, gradients, strict=True)):
                if not math.isfinite(gradient):
                    raise NonFiniteError(non_finite_message(self.num_matvecs))
                self.steps[i] = step + 1
                self.history[i].append(gradient)
                if not gradient <= self.tolerance[i]:
                    left.append(j)
            if len(left) < len(active):
                self.X[:, active] = state.X
                active, state = [active[j] for j in left], state.select(left)
            self.report(active)
            if not active:
                return
        self.X[:, active] = state.X
        for i in active:
            self.statuses[i] = Status.MAX_ITERATIONS

    def _start(self, G: Tensor, active: list[int], beta: Tensor) -> _State:
        alpha = torch.linalg.vector_norm(G, dim=0) / beta
        v, one = G / (alpha * beta), torch.ones_like(alpha)
        zero, nothing = torch.zeros_like(alpha), torch.zeros_like(G)
        u, zetabar = self.B[:, active] / beta, alpha * beta
        return _State(nothing, u, v, v, nothing, alpha, alpha, one, one, one, zero, zetabar)

    def _step(self, t: _State) -> _State:
        u, beta = self._normalised(self.multiply(self.A, t.v) - t.alpha * t.u, t.alpha)
        v, alpha = self._normalised(self.multiply(self.T, u) - beta * t.v, beta)
        alphahat = torch.hypot(t.alphabar, torch.full_like(t.alphabar, math.sqrt(self.damping)))
        rho = torch.hypot(alphahat, beta)
        theta, alphabar = beta / rho * alpha, alphahat / rho * alpha
        thetabar = t.sbar * rho
        rhobar = torch.hypot(t.cbar * rho, theta)
        cbar, sbar = t.cbar * rho / rhobar, theta / rhobar
        hbar = t.h - thetabar * rho / (t.rho * t.rhobar) * t.hbar
        X, h = t.X + cbar * t.zetabar / (rho * rhobar) * hbar, v - theta / rho * t.h
        return _State(X, u, v, h, hbar, alpha, alphabar, rho, rhobar, cbar, sbar, -sbar * t.zetabar)

    def _normalised(self, x: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
        """Return x / |x| and |x|; zero where x is what rounding left."""
        norm = torch.linalg.vector_norm(x, dim=0)
        self.size = torch.maximum(self.size, torch.hypot(norm, coupling).max())
        norm = torch.where(norm <= rounding_level(self.A) * self.size, 0, norm)
        return torch.where(norm > 0, x / norm, 0), norm

    def solution(self) -> SolveResult:
        """Recompute residuals and gradients; say where the recurrences had promised too much."""
        R = self.B - self.multiply(self.A, self.X)
        G = self.multiply(self.T, R) - self.damping * self.X
        norms, gradients = torch.linalg.vector_norm(R, dim=0), torch.linalg.vector_norm(G, dim=0)
        floor = (
            rounding_level(self.A) * self.size * (norms + self.damping**0.5 * torch.linalg.vector_norm(self.X, dim=0))
        )
        converged = gradients <= torch.tensor(self.tolerance, dtype=torch.float64).to(gradients).maximum(floor)
        for i, is_converged in enumerate(converged.tolist()):
            if is_converged:
                self.statuses[i] = Status.CONVERGED
            elif self.statuses[i] is Status.CONVERGED:
                self.statuses[i] = Status.STAGNATED
        more = {"gradient_norms": self.shaped(gradients * self.scale)}
        return self.result(self.X, norms.double().tolist(), converged.tolist(), **more)
