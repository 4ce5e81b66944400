"""Self-scaled Broyden's method against dense formulas in the Hessian's own form, and on problems with known minima."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError, NonFiniteError
from optimizers import Armijo, SSBroyden
from optimizers.newton.ss_broyden import UPDATES
from tests.optimizers.problems import mlp


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def factors(B: Tensor, H: Tensor, s: Tensor, y: Tensor, update: str) -> tuple[float, float]:
    """Return theta and tau of a member of the family, by equations 13 to 23 of Urban et al.; theta = 0 is BFGS."""
    b, h = float(s @ B @ s / (y @ s)), float(y @ H @ y / (y @ s))
    if update == "bfgs":
        return 0.0, 1.0
    if update == "ss-bfgs":
        return 0.0, min(1.0, 1 / b)
    a = b * h - 1
    c = math.sqrt(a / (a + 1))
    rho_minus = min(1.0, h * (1 - c))
    theta_minus, theta_plus = (rho_minus - 1) / a, 1 / rho_minus
    theta = max(theta_minus, min(theta_plus, (1 - b) / b))
    sigma = 1 + theta * a
    root = sigma ** (-1 / (len(s) - 1))
    return theta, min(min(1.0, 1 / b) * root, sigma) if theta <= 0 else min(1.0, 1 / b) * min(root, 1 / theta)


def hessian_update(B: Tensor, s: Tensor, y: Tensor, theta: float, tau: float) -> Tensor:
    """Return tau (B - B s s'B / s'B s + theta s'B s w w') + y y' / s'y: Al-Baali's form, of the Hessian, not of H."""
    Bs, ys = B @ s, y @ s
    w = y / ys - Bs / (s @ Bs)
    scaled = B - torch.outer(Bs, Bs) / (s @ Bs) + theta * (s @ Bs) * torch.outer(w, w)
    return tau * scaled + torch.outer(y, y) / ys


@pytest.mark.parametrize("update", UPDATES)
def test_steps_are_those_of_the_dense_formulas(update: Any) -> None:
    """Eight iterations one by one: s and y from the outside, B by the formula of the Hessian, inverted."""
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = SSBroyden([x], update=update, iterations=1)
    B, seen = torch.eye(6, dtype=torch.float64), set()
    for _ in range(12):
        start = x.detach().clone()
        (g,) = torch.autograd.grad(rosenbrock(x), x)
        optimizer.step(lambda: rosenbrock(x))
        s, (after,) = x.detach() - start, torch.autograd.grad(rosenbrock(x), x)
        d = -torch.linalg.solve(B, g)
        torch.testing.assert_close(s / s.norm(), d / d.norm(), rtol=1e-11, atol=1e-11)
        theta, tau = factors(B, torch.linalg.inv(B), s, after - g, update)
        seen |= {theta > 0, tau < 1}
        B = hessian_update(B, s, after - g, theta, tau)
        H = optimizer.state[x]["inverse"]
        assert torch.equal(H, H.T)
        torch.testing.assert_close(H @ B, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    assert seen == {"bfgs": {False}}.get(update, {False, True})


@pytest.mark.parametrize("update", UPDATES)
def test_iterations_within_a_step_are_those_of_single_steps(update: Any) -> None:
    ends = []
    for iterations in (1, 4, 12):
        x = nn.Parameter(torch.linspace(-1.2, 1.3, 5, dtype=torch.float64))
        optimizer = SSBroyden([x], update=update, iterations=iterations)
        for _ in range(12 // iterations):
            optimizer.step(lambda x=x: rosenbrock(x))
        ends.append(x.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rosenbrock_is_solved_in_any_units(update: Any, scale: float) -> None:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = SSBroyden([x], update=update, iterations=100)
    optimizer.step(lambda: scale * rosenbrock(x))
    torch.testing.assert_close(x.detach(), torch.ones(2).double(), rtol=0, atol=1e-7)
    report = optimizer.last_step
    assert report is not None
    assert report.accepted
    assert report.num_gradients < 120


def test_losses_that_change_between_steps_do_not_mix() -> None:
    """The same curvature with another gradient: H is kept, and from the exact one a Newton step follows."""
    A = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SSBroyden([x], update="bfgs", iterations=40)
    optimizer.step(lambda: x @ A @ x / 2)
    torch.testing.assert_close(optimizer.state[x]["inverse"], torch.linalg.inv(A), rtol=1e-3, atol=1e-4)
    optimizer.param_groups[0]["iterations"] = 1
    b = torch.tensor([5.0, -3.0, 2.0], dtype=torch.float64)
    optimizer.step(lambda: x @ A @ x / 2 - b @ x)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(A, b), rtol=1e-2, atol=1e-3)


def test_the_inverse_of_other_parameters_is_not_used() -> None:
    problem = mlp()
    optimizer = SSBroyden(problem.params, iterations=4)
    optimizer.step(problem.closure)
    problem.params[0].requires_grad_(False)
    before = problem.params[0].clone()
    optimizer.step(problem.closure)
    n = sum(p.numel() for p in problem.params[1:])
    assert optimizer.state[problem.params[1]]["inverse"].shape == (*problem.params[1].shape, n)
    assert torch.equal(problem.params[0], before)
    problem.params[0].requires_grad_(True)
    optimizer.step(problem.closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted


def test_a_direction_that_is_none_starts_anew() -> None:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = SSBroyden([x], iterations=1)
    optimizer.step(lambda: rosenbrock(x))
    optimizer.state[x]["inverse"].neg_()
    before = float(rosenbrock(x.detach()))
    optimizer.step(lambda: rosenbrock(x))
    assert float(rosenbrock(x.detach())) < before
    assert float(torch.linalg.eigvalsh(optimizer.state[x]["inverse"]).min()) > 0


def test_searches_without_slopes_and_curvature_that_is_none() -> None:
    """Along a cubic Armijo's step may show negative curvature: H stays definite."""
    x = nn.Parameter(torch.tensor([2.0, -0.5], dtype=torch.float64))
    optimizer = SSBroyden([x], iterations=30, line_search=Armijo())
    optimizer.step(lambda: (x**4).sum() / 4 - (x**2).sum() / 2 + 0.1 * x.sum())
    assert float(torch.linalg.eigvalsh(optimizer.state[x]["inverse"]).min()) > 0
    assert float(x.grad.abs().max() if x.grad is not None else 1) > 0
    optimizer.step(lambda: (x**4).sum() / 4 - (x**2).sum() / 2 + 0.1 * x.sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.gradient_max < 1e-6


def test_pairs_and_climbing() -> None:
    problem, twin = mlp(), mlp()
    optimizer = SSBroyden(problem.params, loss=F.cross_entropy)
    assert optimizer.step(problem.pair) == SSBroyden(twin.params).step(twin.closure)
    assert torch.equal(problem.flat(), twin.flat())
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    SSBroyden([x], maximize=True).step(lambda: -(x**2).sum())
    assert float(x.detach().abs().max()) < 1e-4


def test_bad_settings_and_losses_are_refused() -> None:
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match="update must be one of ss-broyden, ss-bfgs, bfgs"):
        SSBroyden([x], update="dfp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="iterations must be an integer >= 1"):
        SSBroyden([x], iterations=0)
    with pytest.raises(NonFiniteError):
        SSBroyden([x]).step(lambda: (x - 2).log().sum())
    SSBroyden([x]).step(lambda: (x - 0.5 - x.log()).sum())  # beyond 0 there is no loss: the search steps back
    assert float(x.detach().min()) > 0


def test_a_trial_without_finite_gradient_shortens_the_step() -> None:
    """The sum of roots falls to where its gradient is not finite: the first trial steps across, and others follow."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SSBroyden([w], iterations=10)
    optimizer.step(lambda: w.sqrt().sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted
    assert bool(w.isfinite().all())
    assert float(w.detach().min()) < 1e-6
