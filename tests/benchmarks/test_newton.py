"""The differential equations of Newton's benchmark are those they name, and their references solve them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from benchmarks.newton.bench import PINN_SEEDS, PINNS
from benchmarks.newton.burgers import burgers_equation, burgers_solution
from benchmarks.newton.convection import convection_equation, convection_solution
from benchmarks.newton.pinns import METHODS, pinn_facts
from benchmarks.newton.poisson import poisson_equation, poisson_solution
from optimizers import PointwiseResiduals

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in jvp

Solution = Callable[[Tensor], Tensor]
SOLUTIONS: dict[str, Solution] = {
    "poisson": poisson_solution,
    "convection": convection_solution,
    "burgers": burgers_solution,
}
EQUATIONS: dict[str, Callable[[Solution, Tensor], Tensor]] = {
    "poisson": poisson_equation,
    "convection": convection_equation,
    "burgers": burgers_equation,
}


class Exact(nn.Module):
    def __init__(self, solution: Solution, factor: float = 1.0) -> None:
        super().__init__()
        self.solution, self.factor = solution, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.solution(x)[..., None]


@pytest.mark.parametrize("name", PINNS)
def test_all_residuals_vanish_on_the_exact_solution_only(name: str) -> None:
    """Those of the equation, of the start and of the edge; 2e-11 is the largest, in the layer of Burgers' equation."""
    _, residuals = PINNS[name].make(0)
    residuals.model = Exact(SOLUTIONS[name])
    assert residuals().abs().max() < 1e-9
    residuals.model = Exact(SOLUTIONS[name], 1.01)
    assert residuals().norm() > 1e-3


@pytest.mark.parametrize("name", PINNS)
def test_the_error_is_relative(name: str) -> None:
    assert PINNS[name].error(Exact(SOLUTIONS[name])) < 1e-14
    assert PINNS[name].error(Exact(SOLUTIONS[name], 1.25)) == pytest.approx(0.25)


@pytest.mark.parametrize("name", PINNS)
def test_equations_beside_derivatives_one_by_one(name: str) -> None:
    """On a function that solves none of them, written out with its derivatives."""

    def u(y: Tensor) -> Tensor:
        return (torch.sin(2 * y[..., 0]) * y[..., 1] ** 3)[..., None]

    a, b = torch.rand(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, u_a, u_b = torch.sin(2 * a) * b**3, 2 * torch.cos(2 * a) * b**3, 3 * torch.sin(2 * a) * b**2
    u_aa, u_bb = -4 * value, 6 * torch.sin(2 * a) * b
    expected = {
        "poisson": u_aa + u_bb + 2 * math.pi**2 * torch.sin(math.pi * a) * torch.sin(math.pi * b),
        "convection": u_b + 30 * u_a,
        "burgers": u_b + value * u_a - 0.01 / math.pi * u_aa,
    }[name]
    found = vmap(lambda y: EQUATIONS[name](u, y))(torch.stack([a, b], dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_steepest_slope_of_burgers_equation() -> None:
    """Basdevant et al. (1986), Spectral and finite difference solutions of the Burgers equation: 152.00516."""
    x = torch.tensor([0.0, 1.6037 / math.pi], dtype=torch.float64)
    assert float(-jacrev(burgers_solution)(x)[0]) == pytest.approx(152.00516, abs=5e-6)


def test_burgers_equation_beside_finite_differences() -> None:
    """Runge and Kutta's steps on 801 points, shortly before the layer is steepest: 8e-4 measured, of second order."""
    x = torch.linspace(-1, 1, 801, dtype=torch.float64)
    u, h, dt = -torch.sin(math.pi * x), 2 / 800, 0.3 / 600

    def slope(u: Tensor) -> Tensor:
        inner = torch.zeros_like(u)
        second = (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2
        inner[1:-1] = 0.01 / math.pi * second - (u[2:] ** 2 - u[:-2] ** 2) / (4 * h)
        return inner

    for _ in range(600):
        k1 = slope(u)
        k2 = slope(u + dt / 2 * k1)
        k3 = slope(u + dt / 2 * k2)
        u = u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + dt * k3))
    exact = burgers_solution(torch.stack([x, torch.full_like(x, 0.3)], dim=1))
    assert (u - exact).abs().max() < 2e-3


def test_every_method_makes_a_row() -> None:
    def make(seed: int) -> tuple[nn.Module, PointwiseResiduals]:
        model, residuals = PINNS["poisson"].make(seed)
        residuals.terms = [(residual, points[::30]) for residual, points in residuals.terms]
        return model, residuals

    short = replace(PINNS["poisson"], seconds=0.02, make=make)
    for method in METHODS:
        facts = pinn_facts(short, 0, method)
        assert math.isfinite(facts["loss"])
        assert facts["gradients"] > 0
        assert not facts["success"]


def test_every_method_of_the_command_is_known() -> None:
    assert all(METHODS.keys() >= seeds.keys() for seeds in PINN_SEEDS.values())


def test_points_are_drawn_anew_where_the_residual_is_large() -> None:
    """Under the density (1 + |r| / m) / 2 the mean of |r| is m (1 + v / 2), v its variance over m^2; it is less here.

    Of four times as many even points each is taken once only.
    """
    problem, model = PINNS["burgers"], Exact(burgers_solution, 1.25)
    _, residuals = problem.make(0)
    residuals.model, (residual, points) = model, residuals.terms[0]
    even = residuals()[: len(points)].abs()
    assert problem.renew is not None
    problem.renew(model, residuals)
    assert residuals.terms[0][0] is residual
    found = residuals.terms[0][1]
    assert found.shape == points.shape
    assert bool((found.abs() <= 1).all())
    assert bool((found[:, 1] >= 0).all())
    expected = float(1 + even.var() / even.mean() ** 2 / 2)
    assert 1.5 < float(residuals()[: len(points)].abs().mean() / even.mean()) < expected
