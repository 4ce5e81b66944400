"""Penalised steps against the derivative of the written-out penalty, and what must not be disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.training.gradient_penalty import GradientPenalty, Kind, Mode
from curvature.errors import InputError, NonFiniteError

KINDS: list[Kind] = ["full", "batch", "variance"]
MODES: list[Mode] = ["double_backward", "hessian_product", "finite_difference"]


def problem(dtype: torch.dtype = torch.float64, *layers: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *layers, nn.Linear(4, 1)).to(dtype)
        return model, [(torch.randn(4, 3, dtype=dtype), torch.randn(4, 1, dtype=dtype)) for _ in range(3)]


def closures_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Tensor]]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    return [partial(loss, x, y) for x, y in data]


def exact(model: nn.Module, data: list[tuple[Tensor, Tensor]], kind: str, strength: float) -> tuple[float, Tensor]:
    """Return strength times the penalty and the gradient of loss and penalty, from the definition by `torch.func`."""
    names, params = zip(*model.named_parameters(), strict=True)
    shapes = [p.shape for p in params]
    theta = torch.cat([p.detach().reshape(-1) for p in params])

    def losses(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(s) for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return torch.stack(
            [nn.functional.mse_loss(torch.func.functional_call(model, values, (x,)), y) for x, y in data]
        )

    def penalty(flat: Tensor) -> Tensor:
        rows = torch.func.jacrev(losses)(flat)
        squares = {"full": rows.mean(0).square().sum(), "batch": rows.square().sum(1).mean()}
        squares["variance"] = (rows - rows.mean(0)).square().sum(1).mean()
        return strength * squares[kind]

    return float(penalty(theta)), torch.func.grad(lambda t: losses(t).mean() + penalty(t))(theta)


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_is_the_derivative_of_the_penalty(kind: Kind, mode: Mode) -> None:
    model, data = problem()
    penalty = GradientPenalty(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.7, kind=kind, mode=mode)
    found = penalty.gradients(closures_of(model, data))
    value, gradient = exact(model, data, kind, 0.7)
    assert found.penalty == pytest.approx(value, rel=1e-10)
    error = float((flat_grad(model) - gradient).norm() / gradient.norm())
    assert error < (1e-6 if mode == "finite_difference" else 1e-12)
    costs = {"double_backward": (9, 9, 9), "hessian_product": (12, 9, 12), "finite_difference": (6, 6, 6)}
    assert found.num_gradients == costs[mode][KINDS.index(kind)]


def test_finite_differences_in_float32_are_as_good_as_their_step() -> None:
    model, data = problem(torch.float32)
    penalty = GradientPenalty(
        torch.optim.SGD(model.parameters(), lr=0.1), strength=0.7, kind="batch", mode="finite_difference"
    )
    penalty.gradients(closures_of(model, data))
    gradient = exact(model, data, "batch", 0.7)[1]
    assert float((flat_grad(model) - gradient).norm() / gradient.norm()) < 1e-2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_without_strength_it_is_the_optimizer_itself(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    (a, data), (b, _) = problem(), problem()
    penalty = GradientPenalty(optimizer(a.parameters(), lr=0.01), strength=0.0)
    plain = optimizer(b.parameters(), lr=0.01)
    for _ in range(3):
        penalty.step(closures_of(a, data[:1]))
        plain.zero_grad()
        closures_of(b, data[:1])[0]().backward()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_parameters_buffers_and_random_numbers_are_those_of_one_pass(mode: Mode) -> None:
    model, data = problem(torch.float64, nn.BatchNorm1d(4), nn.Dropout(0.5))
    other, _ = problem(torch.float64, nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    penalty = GradientPenalty(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.5, kind="variance", mode=mode)
    torch.manual_seed(3)
    penalty.gradients(closures_of(model, data))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for closure in closures_of(other, data):
        closure()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), other.buffers(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_masks_are_the_same_in_every_mode() -> None:
    gradients = []
    for mode in MODES:
        model, data = problem(torch.float64, nn.Dropout(0.5))
        penalty = GradientPenalty(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.5, mode=mode)
        torch.manual_seed(5)
        penalty.gradients(closures_of(model, data))
        gradients.append(flat_grad(model))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-5, atol=1e-6)


def test_a_penalty_lowers_what_it_penalises() -> None:
    ends = []
    for strength in (0.0, 1.0):
        model, data = problem()
        penalty = GradientPenalty(torch.optim.SGD(model.parameters(), lr=0.02), strength=strength, kind="variance")
        for _ in range(40):
            penalty.step(closures_of(model, data))
        ends.append(exact(model, data, "variance", 1.0)[0])
    assert ends[1] < 0.5 * ends[0]


def test_a_vanishing_gradient_and_an_unused_parameter() -> None:
    w, unused = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    for mode in MODES:
        GradientPenalty(torch.optim.SGD([w, unused], lr=0.1), strength=1.0, mode=mode).gradients(
            lambda: w.square().sum()
        )
        assert w.grad is not None
        assert unused.grad is not None
        assert not bool(w.grad.any() | unused.grad.any())


def test_bad_arguments_and_losses_are_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.1)
    bad: list[dict[str, Any]] = [
        {"strength": -1.0},
        {"strength": 1.0, "kind": "half"},
        {"strength": 1.0, "mode": "guess"},
    ]
    for settings in bad:
        with pytest.raises(InputError):
            GradientPenalty(sgd, **{"strength": 1.0, **settings})
    with pytest.raises(InputError, match="reach"):
        GradientPenalty(sgd, strength=1.0, reach=0.0)
    penalty = GradientPenalty(sgd, strength=1.0)
    with pytest.raises(InputError, match="empty"):
        penalty.step([])
    with pytest.raises(InputError, match="closure"):
        penalty.step(lambda: w.detach().sum())
    with pytest.raises(NonFiniteError):
        penalty.step(lambda: (w / 0).square().sum())
    assert torch.equal(w.detach(), torch.ones(2))
