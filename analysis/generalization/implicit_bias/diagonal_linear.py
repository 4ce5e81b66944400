"""Diagonal linear networks: of all solutions that of least l1 norm from a small start, of least l2 from a large one.

A linear model with weights b = u^2 - v^2 (entrywise), trained by the gradient flow of |X b - y|^2 from u = v = alpha
until X b = y, ends at

    argmin Q(b) with X b = y,    Q(b) = sum_i alpha^2 q(b_i / alpha^2),    q(z) = 2 - sqrt(4 + z^2) + z arcsinh(z / 2).

alpha -> infinity: Q ~ |b|^2 / (4 alpha^2), the kernel regime; alpha -> 0: Q ~ log(1 / alpha^2) |b|_1, the rich regime.

Reference: Woodworth, Gunasekar, Lee, Moroshko, Savarese, Golan, Soudry and Srebro (2020), Kernel and rich regimes in
overparametrized models, theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from analysis.generalization.implicit_bias.results import DiagonalRun
from analysis.show.drawing import Array
from curvature.arguments import checked
from curvature.errors import InputError, NotConvergedError

__all__ = ["diagonal_linear_flow", "least_norm", "least_q", "q_potential"]


def check_system(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return X (n, d) and y (n,) in float64; refuse what has no unique theorem.

    Raises:
        InputError: for other shapes, numbers that are not finite, or rows that depend on each other.
    """
    if X.ndim != 2 or y.shape != X.shape[:1] or not bool(torch.isfinite(X).all() & torch.isfinite(y).all()):
        raise InputError(f"X must be (n, d) and y (n,), finite; got {tuple(X.shape)} and {tuple(y.shape)}.")
    X, y = X.detach().double().cpu(), y.detach().double().cpu()
    if int(torch.linalg.matrix_rank(X)) < len(X) or not bool(y.any()):
        raise InputError(
            "the rows of X must be independent, n <= d, so that there are solutions of X b = y, and y must not vanish."
        )
    return X, y


def _scaled(X: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, float, float, float]:
    """Return X, y and alpha of the same problem with entries of size 1, and the units of its weights and its times.

    Raises:
        InputError: for an alpha at which other weights than the largest, or the last digits of z, are lost to rounding.
    """
    entry, size = float(X.square().mean().sqrt()), float(y.norm())
    root = math.sqrt(size / entry)
    if not 1e-12 * root <= alpha <= 1e12 * root:
        raise InputError(
            f"alpha must be from {1e-12 * root:.1e} to {1e12 * root:.1e} for these X and y; got {alpha}. Beyond, the "
            "solution is that of least_norm to all digits, of order 1 below and 2 above."
        )
    return X / entry, y / size, alpha / root, size / entry, 1 / (entry * size)


@checked
def q_potential(b: Tensor, alpha: float) -> Tensor:
    """Return Q(b), (), for weights b (d,) and a start alpha > 0.

    Examples:
        >>> q_potential(torch.tensor([2.0]), 100.0) * 4 * 100.0**2  # nearly b^2
        tensor(4.0000, dtype=torch.float64)
    """
    if not (1e-100 <= alpha <= 1e100 and bool(torch.isfinite(b).all())):
        raise InputError(f"alpha must be from 1e-100 to 1e100, and b finite; got alpha {alpha}.")
    b = b.double()
    z = b / alpha**2
    root = torch.hypot(z, torch.full_like(z, 2.0))
    return (b * (torch.asinh(z / 2) - z / (2 + root))).sum()  # 2 - root, without cancellation or overflow


@checked
def least_norm(X: Tensor, y: Tensor, *, order: int) -> Tensor:
    """Return the solution b (d,) of X b = y of smallest |b|_1 (order=1, a linear program) or |b|_2 (order=2).

    Raises:
        InputError: for another order, or a system without a solution.
    """
    X, y = check_system(X, y)
    if order == 2:
        return X.T @ torch.linalg.solve(X @ X.T, y)
    if order != 1:
        raise InputError(f"order must be 1 or 2, got {order}.")
    positive = least_weighted(torch.cat([X, -X], dim=1), y, torch.ones(2 * X.shape[1], dtype=X.dtype))
    return positive[: X.shape[1]] - positive[X.shape[1] :]


def least_weighted(X: Tensor, y: Tensor, costs: Tensor) -> Tensor:
    """Return b >= 0 with X b = y and the smallest costs'b, by linear programming.

    Raises:
        InputError: if there is none.
    """
    from scipy.optimize import linprog

    found = linprog(costs.numpy(), A_eq=X.numpy(), b_eq=y.numpy(), bounds=(0, None), method="highs-ds")
    if not found.success:
        raise InputError(f"X b = y has no solution of this kind ({found.message}).")
    return torch.as_tensor(found.x)


@checked
def least_q(X: Tensor, y: Tensor, alpha: float, *, rtol: float = 1e-12) -> Tensor:
    """Return the minimum b (d,) of Q among the solutions of X b = y, by Newton's method on the dual.

    b = 2 alpha^2 sinh(X'z) with the z that minimises sum_i 2 alpha^2 cosh((X'z)_i) - y'z; from a large alpha down to
    the one asked for, halving it.

    Args:
        X: (n, d), independent rows.
        y: (n,).
        alpha: positive; 1e-12 to 1e12 times the root of |y| over the root mean square of X.
        rtol: of |X b - y| relative to |y|.

    Raises:
        InputError: for arguments out of range.
        NotConvergedError: if Newton's method stalls.
    """
    X, y = check_system(X, y)
    X, y, alpha, unit, _ = _scaled(X, y, alpha)
    stage = max(alpha, float(y.norm()) ** 0.5 + 1)
    z = torch.linalg.solve(X @ X.T, y) / (2 * stage**2)
    while True:
        z = solve_dual(X, y, _Sinh(stage), z, rtol if stage == alpha else 1e-3)
        if stage == alpha:
            return unit * 2 * alpha**2 * torch.sinh(X.T @ z)
        stage = max(alpha, stage / 2)


class Weights(Protocol):
    """The weights of a network as a function of X'z, entry by entry, with their integral and their slope."""

    def integral(self, at: Tensor) -> Tensor: ...

    def __call__(self, at: Tensor) -> Tensor: ...

    def slope(self, at: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Sinh:
    alpha: float

    def integral(self, at: Tensor) -> Tensor:
        return 4 * self.alpha**2 * torch.sinh(at / 2).square()  # cosh less 1, without cancellation

    def __call__(self, at: Tensor) -> Tensor:
        return 2 * self.alpha**2 * torch.sinh(at)

    def slope(self, at: Tensor) -> Tensor:
        return 2 * self.alpha**2 * torch.cosh(at)


def solve_dual(X: Tensor, y: Tensor, weights: Weights, z: Tensor, rtol: float) -> Tensor:
    """Return z with X weights(X'z) = y, by Newton's method on the convex function sum integral(X'z) - y'z.

    Raises:
        NotConvergedError: if it stalls, as where no weights of this kind solve the system.
    """

    def value(z: Tensor) -> Tensor:
        return weights.integral(X.T @ z).sum() - y @ z

    floor, last, size_of_gap = 1e-8 * float(y.norm()), math.inf, math.inf
    for _ in range(500):
        at = X.T @ z
        gap = X @ weights(at) - y
        last, size_of_gap = size_of_gap, float(gap.norm())
        if size_of_gap <= rtol * float(y.norm()) or (last <= floor and size_of_gap > last / 2):  # or rounding is met
            return z
        step, info = torch.linalg.solve_ex((X * weights.slope(at)) @ X.T, -gap)
        if int(info) or not bool(torch.isfinite(step).all()):
            break
        size, here, slope = 1.0, value(z), float(gap @ step)
        while size > 1e-9 and not value(z + size * step) <= here + 1e-4 * size * slope + 1e-15 * abs(float(here)):
            size /= 2
        z = z + size * step
    raise NotConvergedError(f"no weights of this kind were found: |X b - y| is still {size_of_gap:.1e}.", z)


@checked
def diagonal_linear_flow(X: Tensor, y: Tensor, alpha: float, *, rtol: float = 1e-6) -> DiagonalRun:
    """Train b = u^2 - v^2 by the gradient flow of |X b - y|^2 / (2 n) from u = v = alpha, until X b = y.

    The flow is integrated in the n numbers z = -(4 / n) integral of (X b - y) dt, of which all weights are functions:
    u = alpha exp(X'z / 2), v = alpha exp(-X'z / 2), b = 2 alpha^2 sinh(X'z); by a stiff method, since the last of the
    loss goes very slowly where the solution has fewer entries than X has rows.

    Args:
        X: (n, d), n <= d, independent rows.
        y: (n,).
        alpha: start; 1e-12 to 1e12 times the root of |y| over the root mean square of X.
        rtol: |X b - y| / |y| at which to stop.

    Raises:
        InputError: for arguments out of range.
        NotConvergedError: if the integration fails before.

    Examples:
        >>> X, y = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])
        >>> for alpha in (1e-6, 1e2):  # least l1 norm: (0, 1); least l2 norm: (0.4, 0.8)
        ...     print(diagonal_linear_flow(X, y, alpha).solution.round(decimals=3).tolist())
        [0.0, 1.0]
        [0.4, 0.8]
    """
    from scipy.integrate import solve_ivp

    X, y = check_system(X, y)
    if not 0 < rtol < 1:
        raise InputError(f"rtol must be in (0, 1), got {rtol}.")
    inputs, outputs, start, unit, pace = _scaled(X, y, alpha)
    A, goal, n = inputs.numpy(), outputs.numpy(), len(y)

    top = math.asinh(1e8 / (2 * start**2))  # of weights far beyond the path, which only trial steps reach

    def exponents(z: Array) -> Array:
        return np.clip(A.T @ z, -top, top)

    def weights(z: Array) -> Array:
        return 2 * start**2 * np.sinh(exponents(z))

    def rate(_: float, z: Array) -> Array:
        return (goal - A @ weights(z)) * 4 / n

    def slope(_: float, z: Array) -> Array:
        return -(A * (2 * start**2 * np.cosh(exponents(z)))) @ A.T * 4 / n

    def solved(_: float, z: Array) -> float:
        return float(np.linalg.norm(A @ weights(z) - goal) / np.linalg.norm(goal)) - rtol

    solved.terminal = True  # type: ignore[attr-defined]  # as SciPy has it
    limits = {"rtol": 1e-8, "atol": 1e-10 * min(1.0, start**-2), "jac": slope, "events": solved}
    stuck = f"the flow could not be followed to |X b - y| <= {rtol:g} |y|"
    try:
        found = solve_ivp(rate, (0.0, 1e30), np.zeros(n), method="BDF", **limits)
    except ValueError as error:  # numbers that are not finite
        raise NotConvergedError(f"{stuck}: {error}", None) from error
    if found.status != 1:
        raise NotConvergedError(f"{stuck}: {found.message}", found)
    times = pace * np.append(found.t, found.t_events[0][-1])
    path = unit * torch.as_tensor(np.stack([weights(z) for z in [*found.y.T, found.y_events[0][-1]]]))
    gaps = path @ X.T - y
    return DiagonalRun(
        alpha=alpha,
        solution=path[-1],
        expected=least_q(X, y, alpha),
        least_l1=least_norm(X, y, order=1),
        least_l2=least_norm(X, y, order=2),
        times=torch.as_tensor(times),
        losses=gaps.square().sum(1) / (2 * n),
        path=path,
    )
