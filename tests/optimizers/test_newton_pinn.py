"""Poisson's equation by a small network: Levenberg-Marquardt to an accuracy that quasi-Newton methods do not reach.

Set-up of Mueller and Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural gradient descent, with
fewer points: -Laplace u = 2 pi^2 sin(pi x) sin(pi y) on the unit square, zero on its edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacrev

from optimizers import LevenbergMarquardt, NaturalGradient, PointwiseResiduals
from optimizers.newton.line_search import Grid


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0]) * torch.sin(math.pi * x[..., 1])


def equation(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jacrev(jacrev(lambda y: u(y)[0]))(x).diagonal().sum() + 2 * math.pi**2 * solution(x)


def poisson(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    t = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    side, zero, one = torch.linspace(0, 1, 15, dtype=torch.float64), torch.zeros(15).double(), torch.ones(15).double()
    pairs = [(side, zero), (side, one), (zero, side), (one, side)]
    edge = torch.cat([torch.stack(pair, dim=1) for pair in pairs])
    terms = [(equation, torch.cartesian_prod(t, t)), (lambda u, x: u(x)[0], edge)]
    return model, PointwiseResiduals(model, terms, weights=[1.0, 4.0])


def error(model: nn.Module) -> float:
    """Return the root mean square error, where the solution's root mean square is 1/2."""
    t = torch.linspace(0, 1, 60, dtype=torch.float64)
    x = torch.cartesian_prod(t, t)
    return float((model(x)[:, 0] - solution(x)).detach().square().mean().sqrt())


def test_levenberg_marquardt_solves_it() -> None:
    """80 steps, about 4 evaluations each, beside L-BFGS with as many; 5e-6 and 0.4 measured."""
    model, residuals = poisson(0)
    optimizer = LevenbergMarquardt(model.parameters(), damping=1e-3, jacobian=residuals.jacobian)
    evaluations = accelerated = 0
    for _ in range(80):
        optimizer.step(residuals)
        assert optimizer.last_step is not None
        assert optimizer.last_step.accepted
        evaluations += optimizer.last_step.num_evaluations
        accelerated += optimizer.last_step.message.endswith("accelerated")
    found = error(model)
    assert found < 5e-5
    assert accelerated > 40
    twin, same = poisson(0)
    other = torch.optim.LBFGS(
        twin.parameters(), max_iter=evaluations, max_eval=evaluations, history_size=100, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        other.zero_grad()
        loss = same().square().sum() / 2
        loss.backward()
        return loss

    other.step(closure)
    assert found < error(twin) / 100


def test_energy_natural_gradient_falls_at_every_step() -> None:
    model, residuals = poisson(0)
    search = Grid(num_steps=16)
    optimizer = NaturalGradient(model.parameters(), damping=1e-6, line_search=search, jacobian=residuals.jacobian)
    losses = []
    for _ in range(8):
        losses.append(float(optimizer.step(residuals) or 0))
        assert optimizer.last_step is not None
        assert optimizer.last_step.loss_after < losses[-1]
    assert losses == sorted(losses, reverse=True)


def test_spring() -> None:
    model, residuals = poisson(0)
    optimizer = NaturalGradient(
        model.parameters(), lr=0.1, damping=1e-3, momentum=0.9, max_norm=0.5, jacobian=residuals.jacobian
    )
    for _ in range(40):
        optimizer.step(residuals)
    assert error(model) < 0.2
