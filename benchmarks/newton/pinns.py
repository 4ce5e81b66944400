"""What the differential equations have in common: a network is trained by one method for some CPU seconds."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import LevenbergMarquardt, PointwiseResiduals

__all__ = ["PLAIN", "PinnProblem", "pinn_facts", "relative_error", "xavier_tanh"]

PLAIN = "levenberg-marquardt, acceleration=0"


@dataclass(frozen=True, kw_only=True)
class PinnProblem:
    """A differential equation, the networks that start on it, and how long they are trained."""

    make: Callable[[int], tuple[nn.Module, PointwiseResiduals]]
    """Return the network at its start and the residuals, from a seed."""
    error: Callable[[nn.Module], float]
    """Return |u - u*| / |u*|."""
    seconds: float
    """CPU seconds of the process."""
    steps: int
    """At most, of Levenberg-Marquardt with acceleration; ten times as many without."""
    success: float = 1e-5
    """Relative error below which a run has succeeded."""


def xavier_tanh(widths: list[int]) -> nn.Sequential:
    """Return a network of tanh layers in float64, weights after Glorot and Bengio (2010), biases zero."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def relative_error(model: nn.Module, points: Tensor, exact: Tensor) -> float:
    """Return |u - u*| / |u*| on the points."""
    with torch.no_grad():
        return float((model(points)[:, 0] - exact).norm() / exact.norm())


def pinn_facts(problem: PinnProblem, seed: int, method: str) -> dict[str, Any]:
    """Run one method from one seed; Levenberg-Marquardt ends early at its steps or where none is accepted."""
    model, residuals = problem.make(seed)
    begun = time.process_time()
    if method.startswith("levenberg-marquardt"):
        count = _levenberg_marquardt(model, residuals, method, begun, problem)
    else:
        count = _scalar(model, residuals, method, begun, problem.seconds)
    error = problem.error(model)
    return {"loss": error, "digits": -math.log10(error), "success": error < problem.success, "gradients": count}


def _levenberg_marquardt(
    model: nn.Module, residuals: PointwiseResiduals, method: str, begun: float, problem: PinnProblem
) -> int:
    acceleration, count = 0.0 if method == PLAIN else 0.75, 0
    optimizer = LevenbergMarquardt(
        model.parameters(), damping=1e-3, acceleration=acceleration, jacobian=residuals.jacobian
    )
    for _ in range(problem.steps if acceleration else 10 * problem.steps):
        optimizer.step(residuals)
        assert optimizer.last_step is not None
        count += 1 + optimizer.last_step.num_evaluations
        if time.process_time() - begun > problem.seconds or not optimizer.last_step.accepted:
            break
    return count


def _scalar(model: nn.Module, residuals: PointwiseResiduals, method: str, begun: float, seconds: float) -> int:
    count = 0
    optimizer: torch.optim.Optimizer
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

    while time.process_time() - begun < seconds:
        optimizer.step(closure)
    return count
