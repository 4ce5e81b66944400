"""Small quadratic models in the eigenbasis of their matrix, minimised exactly under a bound on the step or a cube.

With y the step, c the gradient and theta the eigenvalues, ascending, the minimiser is y_i = -c_i / (theta_i + lambda)
with theta_0 + lambda >= 0, where lambda is such that |y| is the radius, or lambda / sigma. |y| falls with lambda: one
root, found by bisection of t = lambda - max(0, -theta_0) on a logarithmic scale, which loses no digit of theta_i +
lambda where they are close to singular. In the hard case |y| is too small even at t = 0, and the eigenvector of theta_0
makes up for it.

Reference: More and Sorensen (1983), Computing a trust region step; Cartis, Gould and Toint (2011), Adaptive cubic
regularisation methods, part I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SecularSolution:
    """The global minimiser of a small model."""

    y: Tensor
    """(m,), in the eigenbasis."""
    multiplier: float
    """lambda."""
    on_boundary: bool
    """Whether |y| is the radius."""
    hard_case: bool
    """Whether theta_0 + lambda is zero to rounding."""


def trust_region_minimiser(theta: Tensor, c: Tensor, radius: float) -> SecularSolution:
    """Minimise c'y + sum_i theta_i y_i^2 / 2 over |y| <= radius; float64, theta ascending."""
    base = max(0.0, -float(theta[0]))
    if base == 0:
        y = _steps(theta, c, 0.0)
        if y is not None and float(y.norm()) <= radius:
            return SecularSolution(y=y, multiplier=0.0, on_boundary=False, hard_case=False)
    highest = float(c.norm()) / radius
    return _at_root(theta, c, base, highest, lambda _: radius, on_boundary=True)


def cubic_minimiser(theta: Tensor, c: Tensor, sigma: float) -> SecularSolution:
    """Minimise c'y + sum_i theta_i y_i^2 / 2 + sigma/3 |y|^3; float64, theta ascending."""
    base = max(0.0, -float(theta[0]))
    highest = (sigma * float(c.norm())) ** 0.5
    return _at_root(theta, c, base, highest, lambda t: (base + t) / sigma, on_boundary=False)


def _at_root(
    theta: Tensor, c: Tensor, base: float, highest: float, length: Callable[[float], float], *, on_boundary: bool
) -> SecularSolution:
    shifted = theta + base
    scale = max(float(theta.abs().max()), highest)
    eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    low, high = tiny, max(highest, tiny)
    y_low = _steps(shifted, c, low)
    if y_low is not None and float(y_low.norm()) < length(low):
        y = torch.where(shifted > 0, -c / shifted, 0)
        missing = max(length(0.0) ** 2 - float(y.square().sum()), 0.0) ** 0.5
        y[0] += missing if float(c[0]) <= 0 else -missing
        return SecularSolution(y=y, multiplier=base, on_boundary=on_boundary, hard_case=base > 0)
    while high > low * (1 + 2 * eps):
        middle = low**0.5 * high**0.5
        if not low < middle < high:
            break
        y_middle = _steps(shifted, c, middle)
        too_long = y_middle is None or float(y_middle.norm()) > length(middle)
        low, high = (middle, high) if too_long else (low, middle)
    y = -c / (shifted + high)
    hard = base > 0 and high <= 100 * eps * scale
    return SecularSolution(y=y, multiplier=base + high, on_boundary=on_boundary, hard_case=hard)


def _steps(shifted: Tensor, c: Tensor, t: float) -> Tensor | None:
    """Return -c / (shifted + t), zero where c is; None where its square would overflow."""
    y = torch.where(c != 0, -c / (shifted + t), 0)
    return y if float(y.abs().max()) < torch.finfo(y.dtype).max ** 0.5 / len(y) else None
