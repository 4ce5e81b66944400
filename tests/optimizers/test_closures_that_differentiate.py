"""Closures whose losses torch differentiates wrongly in silence: the optimizers mend or refuse them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curvature.errors import CheckFailedError
from optimizers import ESGD, SASSHA, AdaHessian, NewtonCG
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


class Followed(nn.Module):
    """Follows its inputs by a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


def moving() -> nn.Module:
    torch.manual_seed(0)
    power = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), power, Followed(), nn.Dropout(0.3), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(4, 3)).double()


def penalised(model: nn.Module, penalty: str) -> Tensor:
    """Return the loss, with a penalty on the gradient in the inputs before it, after it, or none."""
    torch.manual_seed(5)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3

    def slope() -> Tensor:
        inputs = x.clone().requires_grad_()
        return torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)[0].square().sum()

    before = slope() if penalty == "before" else 0.0
    loss = F.cross_entropy(model(x), y) + before
    return loss + slope() if penalty == "after" else loss


@pytest.mark.parametrize("optimizer", [AdaHessian, ESGD, SASSHA, NewtonCG])
@pytest.mark.parametrize("penalties", [("before", "before"), ("after", "none"), ("none", "before"), ("none", "after")])
def test_closures_that_begin_to_differentiate_move_buffers_and_random_numbers_once(
    optimizer: Callable[..., torch.optim.Optimizer], penalties: tuple[str, ...]
) -> None:
    model = moving()
    own = optimizer(model.parameters())
    for penalty in penalties:
        once = copy.deepcopy(model)
        penalised(once, penalty)
        drawn = torch.rand(3)
        own.step(lambda p=penalty: penalised(model, p))
        torch.testing.assert_close(dict(model.named_buffers()), dict(once.named_buffers()), rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.rand(3), drawn)
