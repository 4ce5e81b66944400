"""Burgers' equation with a steep layer, u_t + u u_x = (0.01 / pi) u_xx, by a small network.

Problem of Raissi, Perdikaris and Karniadakis (2019), Physics-informed neural networks: u(x, 0) = -sin(pi x) on [-1, 1],
zero at both ends, t in [0, 1]; tanh layers of the plain inputs, all weights 1. They have eight hidden layers of 20 and
10,000 points inside, 100 on the boundary, that stay; this network has three of 20, with 2000 points and 150. Points
inside are drawn anew as training goes on, most where the residual is large, since the layer at x = 0 is too thin for
points that stay: Wu, Zhu, Tan, Kartha and Lu (2023), A comprehensive study of non-adaptive and residual-based adaptive
sampling for physics-informed neural networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp

from benchmarks.newton.pinns import PinnProblem, relative_error, xavier_tanh
from optimizers import PointwiseResiduals

__all__ = ["BURGERS", "burgers_equation", "burgers_solution"]

VISCOSITY = 0.01 / math.pi
NUM_POINTS = 2000


@functools.cache
def _hermite(order: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite.hermgauss(order)
    return nodes, np.log(weights)


def burgers_solution(x: Tensor, order: int = 100) -> Tensor:
    """Return u at points (x, t), by the transformation of Cole and Hopf: -E sin(pi y) w(y) / E w(y).

    y is normal with mean x and variance 2 nu t, w(y) = exp(-cos(pi y) / (2 pi nu)); E by Gauss and Hermite's rule of
    that order.
    """
    nodes, log_weights = (torch.from_numpy(a) for a in _hermite(order))  # tensors made under jvp must not be kept
    y = x[..., :1] - torch.sqrt(4 * VISCOSITY * x[..., 1:]) * nodes
    chance = torch.softmax(log_weights - torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY), dim=-1)
    return -(chance * torch.sin(math.pi * y)).sum(-1)


def burgers_equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return u_t + u u_x - nu u_xx at one point (x, t)."""
    space, time = torch.eye(2, dtype=x.dtype)

    def value(y: Tensor) -> Tensor:
        return u(y)[0]

    def slope(y: Tensor) -> Tensor:
        derivative: Tensor = jvp(value, (y,), (space,))[1]
        return derivative

    here, u_t = jvp(value, (x,), (time,))[:2]
    u_x, u_xx = jvp(slope, (x,), (space,))[:2]
    residual: Tensor = u_t + here * u_x - VISCOSITY * u_xx
    return residual


def _candidates(number: int) -> Tensor:
    return torch.rand(number, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]).double() - torch.tensor([1.0, 0.0])


def _renew(model: nn.Module, residuals: PointwiseResiduals) -> None:
    """Draw points inside by density 1 + |residual| / its mean, from four times as many even ones."""
    points = _candidates(4 * NUM_POINTS)
    with torch.no_grad():
        sizes = PointwiseResiduals(model, [(burgers_equation, points)])().abs()
    chosen = torch.multinomial(sizes / sizes.mean() + 1, NUM_POINTS)
    residuals.terms[0] = (burgers_equation, points[chosen])


def _make(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
    torch.manual_seed(seed)
    model = xavier_tanh([2, 20, 20, 20, 1])
    start = torch.linspace(-1, 1, 100, dtype=torch.float64)
    first = torch.stack([start, torch.zeros_like(start)], dim=1)
    ends = torch.cartesian_prod(torch.tensor([-1.0, 1.0]).double(), torch.linspace(0, 1, 25).double())
    terms = [
        (burgers_equation, _candidates(NUM_POINTS)),
        (lambda u, x: u(x)[0] + torch.sin(math.pi * x[0]), first),
        (lambda u, x: u(x)[0], ends),
    ]
    return model, PointwiseResiduals(model, terms)


def _error(model: nn.Module) -> float:
    x, t = torch.linspace(-1, 1, 256, dtype=torch.float64), torch.linspace(0, 1, 100, dtype=torch.float64)
    points = torch.cartesian_prod(x, t)
    return relative_error(model, points, burgers_solution(points))


BURGERS = PinnProblem(make=_make, error=_error, seconds=180.0, success=6.7e-4, renew=_renew)
