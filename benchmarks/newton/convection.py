"""Convection on a circle, u_t + 30 u_x = 0, by a small network: a published failure of physics-informed networks.

Set-up of Krishnapriyan, Gholami, Zhe, Kirby and Mahoney (2021), Characterizing possible failure modes in
physics-informed neural networks: u(x, 0) = sin x, points (x, t) in [0, 2 pi] x [0, 1], tanh layers of the plain inputs,
periodicity as a term of the loss, all weights 1. Their network has four hidden layers of 50, this one four of 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp

from benchmarks.newton.pinns import PinnProblem, relative_error, xavier_tanh
from optimizers import PointwiseResiduals

__all__ = ["CONVECTION", "SPEED", "convection_equation", "convection_solution"]

SPEED = 30.0


def convection_solution(x: Tensor) -> Tensor:
    """Return sin(x - 30 t) at points (x, t)."""
    return torch.sin(x[..., 0] - SPEED * x[..., 1])


def convection_equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return u_t + 30 u_x at one point (x, t)."""
    slope: Tensor = jvp(lambda y: u(y)[0], (x,), (x.new_tensor([SPEED, 1.0]),))[1]
    return slope


def _seam(u: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    edge = torch.zeros_like(t)
    return (u(torch.cat([edge, t])) - u(torch.cat([edge + 2 * math.pi, t])))[0]


def _make(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
    torch.manual_seed(seed)
    model = xavier_tanh([2, 10, 10, 10, 10, 1])
    x, t = (torch.arange(k, dtype=torch.float64).add(0.5) / k for k in (24, 48))
    inside = torch.cartesian_prod(2 * math.pi * x, t)
    start = torch.linspace(0, 2 * math.pi, 50, dtype=torch.float64)
    first = torch.stack([start, torch.zeros_like(start)], dim=1)
    terms = [
        (convection_equation, inside),
        (lambda u, x: u(x)[0] - convection_solution(x), first),
        (_seam, torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]),
    ]
    return model, PointwiseResiduals(model, terms)


def _error(model: nn.Module) -> float:
    x, t = torch.linspace(0, 2 * math.pi, 256, dtype=torch.float64), torch.linspace(0, 1, 100, dtype=torch.float64)
    points = torch.cartesian_prod(x, t)
    return relative_error(model, points, convection_solution(points))


CONVECTION = PinnProblem(make=_make, error=_error, seconds=25.0, success=2e-2)
