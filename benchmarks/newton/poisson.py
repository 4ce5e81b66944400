"""Poisson's equation on the unit square by a small network, at equal seconds of the process.

Set-up of Mueller and Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural gradient descent: one
hidden layer of 32, 30 x 30 points inside, parameters drawn with deviation 0.1. 120 points on the edge, at weight 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacrev

from benchmarks.newton.pinns import PinnProblem, relative_error
from optimizers import PointwiseResiduals

__all__ = ["POISSON", "poisson", "poisson_equation", "poisson_solution"]


def poisson_solution(x: Tensor) -> Tensor:
    """Return sin(pi x) sin(pi y) at points (x, y)."""
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def poisson_equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return Laplace u + 2 pi^2 sin(pi x) sin(pi y) at one point."""
    return jacrev(jacrev(lambda y: u(y)[0]))(x).diagonal().sum() + 2 * math.pi**2 * poisson_solution(x)


def poisson(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
    """Return the network at its start and the residuals."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    t = (torch.arange(30, dtype=torch.float64) + 0.5) / 30
    s, zero, one = torch.linspace(0, 1, 30, dtype=torch.float64), torch.zeros(30).double(), torch.ones(30).double()
    edge = torch.cat([torch.stack(pair, dim=1) for pair in [(s, zero), (s, one), (zero, s), (one, s)]])
    terms = [(poisson_equation, torch.cartesian_prod(t, t)), (lambda u, x: u(x)[0], edge)]
    return model, PointwiseResiduals(model, terms, weights=[1.0, 4.0])


def _error(model: nn.Module) -> float:
    grid = torch.linspace(0, 1, 200, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    return relative_error(model, points, poisson_solution(points))


POISSON = PinnProblem(make=poisson, error=_error, seconds=15.0)
