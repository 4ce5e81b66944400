"""Batch normalisation by statistics of the batch in closed form, as closures of optimizers record it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvature.autograd import lean
from curvature.autograd.batch_statistics import BatchNorm, BatchNormBackward
from curvature.autograd.lean import LeanLayers
from optimizers import AdaHessian
from optimizers.shared.differentiation import ClosureRecorder
from tests.checks import assert_close
from tests.curvature.autograd.test_lean import real, second_derivative

SHAPES = {
    "rows": real(5, 4),
    "sequences": real(3, 4, 6),
    "images": 3 + 2 * real(2, 4, 3, 5),
    "channels last": real(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "volumes": real(2, 4, 2, 3, 2),
    "transposed": real(6, 4, 3).transpose(0, 2),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_AGREES", {})


def as_trained() -> LeanLayers:
    return LeanLayers(corrections_only=True, as_trained=True)


def normalised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True, eps=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form_agrees_with_autograd(shape: str) -> None:
    inputs = [SHAPES[shape], real(4, seed=1), real(4, seed=2)]
    for chosen in ([0, 1, 2], [0], [0, 1], [0, 2]):
        layers = as_trained()
        actual = second_derivative(normalised, inputs, chosen, layers)
        assert layers.num_replaced == 1
        assert_close(actual, second_derivative(normalised, inputs, chosen), 1e-11)


def test_derivatives_agree_with_differences() -> None:
    inputs = [t.requires_grad_() for t in (real(3, 4, 2), real(4, seed=1), real(4, seed=2))]
    assert torch.autograd.gradcheck(lambda *t: BatchNorm.apply(*t, None, None, 0.0, 0.01), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: BatchNorm.apply(*t, None, None, 0.0, 0.01), inputs)


def test_a_graph_of_the_second_derivative_is_refused() -> None:
    x, w, b = real(5, 4).requires_grad_(), real(4, seed=1).requires_grad_(), real(4, seed=2)
    (g,) = torch.autograd.grad(BatchNorm.apply(x, w, b, None, None, 0.0, 0.01).sin().sum(), w, create_graph=True)
    torch.autograd.grad(g.sin().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="holds two derivatives"):
        torch.autograd.grad(g.sin().sum(), x, create_graph=True)


def test_gradient_without_a_graph_is_autograds() -> None:
    inputs = [real(3, 4, 5), real(4, seed=1), real(4, seed=2)]

    def gradient() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(normalised(*leaves).sin().sum(), leaves))

    with as_trained():
        actual = gradient()
    for a, b in zip(actual, gradient(), strict=True):
        assert_close(a, b, 1e-12)


def test_weights_of_zero() -> None:
    inputs = [real(3, 4, 5), torch.tensor([0.0, 1.0, 0.0, -2.0], dtype=torch.float64), real(4, seed=2)]
    actual = second_derivative(normalised, inputs, [0, 1, 2], as_trained())
    assert_close(actual, second_derivative(normalised, inputs, [0, 1, 2]), 1e-11)


def test_running_statistics_move_once() -> None:
    plain, closed = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()
    x = real(6, 4).requires_grad_()
    plain(x)
    with as_trained() as layers:
        closed(x)
    assert layers.num_replaced == 1
    for a, b in zip(plain.buffers(), closed.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [BatchNorm, BatchNormBackward])
def test_wrong_closed_form_is_found_out_and_not_used(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = function.backward

    def wrong(ctx: Any, *grads: Any) -> Any:
        return tuple(1.01 * g if isinstance(g, Tensor) else g for g in right(ctx, *grads))

    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    inputs = [real(3, 4, 5), real(4, seed=1), real(4, seed=2)]
    layers = as_trained()
    actual = second_derivative(normalised, inputs, [0, 1, 2], layers)
    assert layers.num_replaced == 0
    assert torch.equal(actual, second_derivative(normalised, inputs, [0, 1, 2]))


LEFT: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "running statistics": lambda x, w, b: F.batch_norm(x, torch.zeros(4), torch.ones(4), w, b),
    "no affine map": lambda x, *_: F.batch_norm(x, None, None, training=True),
    "no bias": lambda x, w, _: F.batch_norm(x, None, None, w, training=True),
    "no graph": lambda x, w, b: normalised(x.detach(), w, b),
    "mixed dtypes": lambda x, w, b: normalised(x.bfloat16(), w.float(), b.float()),
    "checkpointing": lambda x, w, b: checkpoint(normalised, x, w, b, use_reentrant=False).sum().backward(),
}


@pytest.mark.parametrize("call", LEFT)
def test_what_is_left_to_autograd(call: str) -> None:
    x, w, b = (t.float().requires_grad_() for t in (real(3, 4, 5), real(4), real(4)))
    with as_trained() as layers:
        LEFT[call](x, w, b)
    assert layers.num_replaced == 0
    with LeanLayers(corrections_only=True) as layers:  # an objective's, which compares whole products
        normalised(x, w, b)
    assert layers.num_replaced == 0


def test_a_single_value_a_channel_is_torchs_error() -> None:
    with as_trained(), pytest.raises(ValueError, match="more than 1 value per channel"):
        normalised(real(1, 4).requires_grad_(), real(4), real(4))


def test_closure_that_differentiates_itself_is_recorded_anew() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = real(6, 3)

    def penalty() -> Tensor:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        return slope.square().sum()

    recorder = ClosureRecorder()
    recorder.run(lambda: model(x).square().sum())
    value = recorder.run(penalty)
    assert recorder.forward_differentiates
    params = list(model.parameters())[:-1]  # the last bias shifts outputs, not slopes
    found, expected = (torch.autograd.grad(v, params, create_graph=True) for v in (value, penalty()))
    a, b = (torch.cat([part.detach().reshape(-1) for part in g]) for g in (found, expected))
    assert_close(a, b, 1e-11)
    assert torch.autograd.grad(sum(part.square().sum() for part in found), params)  # of the third order, not refused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_of_adahessian_are_those_of_autograd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*, closed: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        block = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)]
        model = nn.Sequential(*block, nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
        model.to(dtype)
        x, y = real(16, 1, 6, 6).to(dtype), torch.arange(16) % 2
        optimizer = AdaHessian(model.parameters(), lr=0.01)
        if not closed:
            monkeypatch.setattr(lean, "_OF_STATISTICS", {})
        for _ in range(4):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
        return [t.detach() for t in (*model.parameters(), *model.buffers())], sum(lean._AGREES.values())

    actual, used = trained(closed=True)
    assert used == 2
    for a, b in zip(actual, trained(closed=False)[0], strict=True):
        assert_close(a.double(), b.double(), 1e-9 if dtype == torch.float64 else 2e-4)
