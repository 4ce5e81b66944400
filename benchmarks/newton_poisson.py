"""Poisson's equation on the unit square by a small network, at equal seconds of the process.

Set-up of Mueller and Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural gradient descent: one
hidden layer of 32, 30 x 30 points inside, parameters drawn with deviation 0.1. 120 points on the edge, at weight 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from optimizers import LevenbergMarquardt, PointwiseResiduals

__all__ = ["POISSON_METHODS", "poisson", "poisson_facts"]

SECONDS, STEPS = 15.0, 300  # Levenberg-Marquardt ends at whichever comes first, the others at the seconds
POISSON_METHODS = ("levenberg-marquardt", "levenberg-marquardt, acceleration=0", "torch L-BFGS", "torch Adam")


def _solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def _equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jacrev(jacrev(lambda y: u(y)[0]))(x).diagonal().sum() + 2 * math.pi**2 * _solution(x)


def poisson(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
    """Return the network at its start and the residuals."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    t = (torch.arange(30, dtype=torch.float64) + 0.5) / 30
    s, zero, one = torch.linspace(0, 1, 30, dtype=torch.float64), torch.zeros(30).double(), torch.ones(30).double()
    edge = torch.cat([torch.stack(pair, dim=1) for pair in [(s, zero), (s, one), (zero, s), (one, s)]])
    terms = [(_equation, torch.cartesian_prod(t, t)), (lambda u, x: u(x)[0], edge)]
    return model, PointwiseResiduals(model, terms, weights=[1.0, 4.0])


def relative_error(model: nn.Module) -> float:
    """Return |u - u*| / |u*| on 200 x 200 points."""
    grid = torch.linspace(0, 1, 200, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    exact = _solution(points)
    with torch.no_grad():
        return float((model(points)[:, 0] - exact).norm() / exact.norm())


def poisson_facts(seed: int, method: str) -> dict[str, Any]:
    """Run one method from one seed."""
    model, residuals = poisson(seed)
    begun = time.process_time()
    count = 0
    optimizer: torch.optim.Optimizer
    if method.startswith("levenberg-marquardt"):
        acceleration = 0.0 if "acceleration=0" in method else 0.75
        ours = LevenbergMarquardt(
            model.parameters(), damping=1e-3, acceleration=acceleration, jacobian=residuals.jacobian
        )
        for _ in range(STEPS if acceleration else 10 * STEPS):
            ours.step(residuals)
            assert ours.last_step is not None
            count += 1 + ours.last_step.num_evaluations
            if time.process_time() - begun > SECONDS or not ours.last_step.accepted:
                break
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if method == "torch L-BFGS":
            settings: dict[str, Any] = {"history_size": 100, "line_search_fn": "strong_wolfe", "tolerance_change": 0.0}
            optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, max_eval=1000, **settings)

        def closure() -> Tensor:
            nonlocal count
            count += 1
            optimizer.zero_grad()
            loss = residuals().square().sum() / 2
            loss.backward()
            return loss

        while time.process_time() - begun < SECONDS:
            optimizer.step(closure)
    error = relative_error(model)
    return {"loss": error, "digits": -math.log10(error), "success": error < 1e-5, "gradients": count}
