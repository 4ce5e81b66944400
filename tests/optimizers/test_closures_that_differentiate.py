"""Closures whose losses torch differentiates wrongly in silence: the optimizers mend or refuse them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curvature.errors import CheckFailedError
from optimizers import AdaHessian, NewtonCG
from optimizers.newton.evaluations import Evaluations
from optimizers.newton.flat import FlatParams
from optimizers.shared.differentiation import ClosureRecorder
from tests.checks import assert_close
from tests.references import derivative_along, flat_gradient


def residual(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad((g[:, 0] * x[:, 1].detach()).sum(), x, create_graph=True)[0][:, 0] + x[:, 1].sin()


class WrittenOut(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c / (c.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def make(layer: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), layer(), nn.Linear(4, 1)).double(), torch.rand(6, 2, dtype=torch.float64)


def test_products_of_closures_with_norms_and_second_derivatives() -> None:
    (model, x), (by_hand, _) = make(lambda: nn.LayerNorm(4)), make(lambda: WrittenOut(4))
    params = list(by_hand.parameters())
    v = torch.randn(26, dtype=torch.float64)[: sum(p.numel() for p in params)]
    expected = derivative_along(
        lambda: flat_gradient(residual(by_hand, x).square().mean(), params, create_graph=False), params, v
    )
    recorder = ClosureRecorder()
    for _ in range(2):
        evaluations = Evaluations(
            FlatParams(list(model.parameters())),
            lambda: residual(model, x).square().mean(),
            None,
            kind="hessian",
            loss=None,
            rule=None,
            recorder=recorder,
        )
        assert_close(evaluations.linearise().operator @ v, expected, 1e-6)
    assert recorder.forward_differentiates


def test_weight_norm_has_its_own_second_derivative() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Tanh(), nn.Linear(3, 1)).double()
    x, params = torch.rand(6, 2, dtype=torch.float64), list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().mean()

    expected = derivative_along(lambda: flat_gradient(loss(), params), params, v)
    evaluations = Evaluations(FlatParams(params), loss, None, kind="hessian", loss=None, rule=None)
    assert_close(evaluations.linearise().operator @ v, expected, 1e-7)
    loss().backward(create_graph=True)  # the classic form shows the optimizer gradients only
    with pytest.raises(CheckFailedError, match="WeightNorm"):
        AdaHessian(params).step()


pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize(
    "step",
    [
        lambda m, loss: NewtonCG(m.parameters()).step(loss),
        lambda m, loss: AdaHessian(m.parameters()).step(loss),
        lambda m, loss: (loss().backward(create_graph=True), AdaHessian(m.parameters()).step()),
    ],
)
def test_marked_functions_are_refused(step: Callable[[nn.Module, Callable[[], Tensor]], Any]) -> None:
    model = nn.Linear(2, 1)
    for _ in range(2):
        model.zero_grad()
        with pytest.raises(CheckFailedError, match="once_differentiable"):
            step(model, lambda: Square.apply(model(torch.ones(2, 2))).square().sum())
