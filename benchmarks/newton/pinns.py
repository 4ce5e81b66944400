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

from optimizers import Grid, LevenbergMarquardt, NaturalGradient, PointwiseResiduals, SSBroyden
from optimizers.newton.full_batch import FullBatchOptimizer

__all__ = ["METHODS", "PLAIN", "PinnProblem", "pinn_facts", "relative_error", "xavier_tanh"]

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
    success: float = 1e-5
    """Relative error below which a run has succeeded."""
    renew: Callable[[nn.Module, PointwiseResiduals], None] | None = None
    """Draws the points anew; None where they stay."""


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
    """Run one method from one seed; those with a line search or trials end early where no step is found."""
    model, residuals = problem.make(seed)
    begun, count, since = time.process_time(), 0, 0.0
    optimizer = METHODS[method](model, residuals)
    ours = isinstance(optimizer, FullBatchOptimizer)
    by_loss = not ours or isinstance(optimizer, SSBroyden)

    def closure() -> Tensor:
        nonlocal count
        loss = residuals().square().sum() / 2
        if not ours:
            count += 1
            optimizer.zero_grad()
            loss.backward()
        return loss

    while time.process_time() - begun < problem.seconds:
        optimizer.step(closure if by_loss else residuals)  # type: ignore[arg-type] # torch asks for numbers
        since += PER_STEP.get(method, 1)
        if isinstance(optimizer, FullBatchOptimizer):
            report = optimizer.last_step
            assert report is not None
            count += report.num_evaluations + (0 if by_loss else 1)
            if not report.accepted and problem.renew is None:
                break
        if problem.renew is not None and since >= 10:
            problem.renew(model, residuals)
            since = 0.0
    error = problem.error(model)
    return {"loss": error, "digits": -math.log10(error), "success": error < problem.success, "gradients": count}


def _natural(model: nn.Module, residuals: PointwiseResiduals, **settings: Any) -> NaturalGradient:
    return NaturalGradient(model.parameters(), line_search=Grid(), jacobian=residuals.jacobian, **settings)


def _lbfgs(model: nn.Module, _: PointwiseResiduals) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"history_size": 100, "line_search_fn": "strong_wolfe", "tolerance_change": 0.0}
    return torch.optim.LBFGS(model.parameters(), max_iter=50, max_eval=1000, **settings)


METHODS: dict[str, Callable[[nn.Module, PointwiseResiduals], torch.optim.Optimizer]] = {
    "levenberg-marquardt": lambda m, r: LevenbergMarquardt(m.parameters(), damping=1e-3, jacobian=r.jacobian),
    PLAIN: lambda m, r: LevenbergMarquardt(m.parameters(), damping=1e-3, acceleration=0.0, jacobian=r.jacobian),
    "ss-broyden": lambda m, _: SSBroyden(m.parameters(), iterations=50),
    "bfgs": lambda m, _: SSBroyden(m.parameters(), update="bfgs", iterations=50),
    "energy natural gradient": lambda m, r: _natural(m, r, damping=1e-5),
    "energy natural gradient, rank 100": lambda m, r: _natural(m, r, damping=1e-5, rank=100),
    "spring": lambda m, r: _natural(m, r, damping=1e-4, momentum=0.9),
    "torch L-BFGS": _lbfgs,
    "torch Adam": lambda m, _: torch.optim.Adam(m.parameters(), lr=1e-3),
}
PER_STEP = {"ss-broyden": 50, "torch L-BFGS": 50}
"""Iterations of a step; points that are drawn anew are so after 10, or one step where it holds more."""
