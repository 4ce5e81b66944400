"""The third derivative contracted twice with a vector, against torch.func on the flattened loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.engine import recording
from curvature.errors import DataError, InputError
from curvature.objective.third_order import curvature_gradient


def network(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)) for n in (5, 2)
    ]


def reference(model: nn.Module, reduction: str, v: Tensor) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y, reduction=reduction)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.func.jacrev(lambda t: v @ torch.func.jacrev(torch.func.grad(loss))(t) @ v)(theta)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize(("reduction", "limit"), [("mean", 0), ("sum", 1 << 25)])
def test_equals_the_dense_third_derivative(
    activation: nn.Module, reduction: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_FRUGAL", limit)
    model = network(activation)
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction), batches())
    v = torch.randn(objective.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = curvature_gradient(objective, v)
    torch.testing.assert_close(found, reference(model, reduction, v), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_without_curvature_has_none_that_changes() -> None:
    model = nn.Linear(2, 1)
    objective = Objective(model, None, [torch.ones(3, 2)], forward=lambda m, x: m(x).mean(), weight=len)
    assert torch.equal(curvature_gradient(objective, torch.ones(3)), torch.zeros(3))
    quadratic = Objective(model, nn.MSELoss(), [(torch.ones(3, 2), torch.zeros(3, 1))])
    assert float(curvature_gradient(quadratic, torch.ones(3)).norm()) == 0.0


class Twice(torch.autograd.Function):
    """A function that can be differentiated twice, and refuses more."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x**3

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * Once.apply(*ctx.saved_tensors)  # type: ignore[attr-defined]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return 3 * x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 6 * ctx.saved_tensors[0]  # type: ignore[attr-defined]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(nn.Tanh())
    objective = Objective(model, nn.CrossEntropyLoss(), batches())
    with pytest.raises(InputError, match=r"shape \(31,\)"):
        curvature_gradient(objective, torch.ones(2))
    nothing = Objective(model, nn.CrossEntropyLoss(), [(torch.ones(1, 3).double(), torch.tensor([-100]))])
    with pytest.raises(DataError, match="zero"):
        curvature_gradient(nothing, torch.ones(31).double())
    line = nn.Linear(1, 1, bias=False)
    rough = Objective(line, None, [torch.ones(1, 1)], forward=lambda m, x: Twice.apply(m(x)).sum() ** 2, weight=len)
    monkeypatch.setattr(recording, "_FRUGAL", 0)
    with pytest.raises(InputError, match="without a third derivative"):
        curvature_gradient(rough, torch.ones(1))
