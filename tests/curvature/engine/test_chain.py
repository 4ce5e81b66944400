"""Products of perceptrons in plain matrix products, against autograd; and what is none stays with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, JacobianOperator, Objective
from curvature.engine.chain import Chain
from curvature.errors import NonFiniteError
from tests.checks import assert_close
from tests.references import dense_hessian, dense_jacobian

N = 12
RIGHT = Chain._backward


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perceptron(*functions: nn.Module, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), *functions, nn.Linear(5, 3, bias=bias)).double()


def deep(last: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False), nn.Linear(5, 5), nn.Softplus(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, 3), last).double()


CHAINS: dict[str, Callable[[], nn.Module]] = {
    **{type(f).__name__: lambda f=f: perceptron(f) for f in (nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.ReLU())},
    "leaky": lambda: perceptron(nn.LeakyReLU(0.3), nn.Softplus(beta=2.0)),
    "no bias": lambda: perceptron(nn.Tanh(), bias=False),
    "deep": lambda: deep(nn.Identity()),
    "function last": lambda: deep(nn.Tanh()),
    "linear": lambda: nn.Linear(4, 3).double(),
}
CLASSES = torch.arange(N) % 3
LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss(weight=real(3).abs(), label_smoothing=0.1), CLASSES),
    "squares": (nn.MSELoss(reduction="sum"), real(N, 3, seed=3)),
    "coins": (nn.BCEWithLogitsLoss(), real(N, 3, seed=4).sigmoid()),
}


def matrices(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return Hessian, Gauss-Newton matrix and Jacobian by autograd alone."""
    params = list(model.parameters())
    J = dense_jacobian(model, [data], params)
    z = model(data[0]).detach()
    M = torch.autograd.functional.hessian(lambda z: loss(z, data[1]), z).reshape(z.numel(), z.numel())
    return dense_hessian(lambda: loss(model(data[0]), data[1]), params), J.T @ M @ J, J


def check_all(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], in_chain: bool) -> Objective:
    H, G, J = matrices(model, loss, data)
    objective = Objective(model, loss, data, keep_graphs=True)
    for matrix, dense in ((HessianOperator(objective), H), (GGNOperator(objective), G)):
        assert_close(matrix.to_dense(), dense, 1e-11)
        assert_close(matrix @ real(len(H)), dense @ real(len(H)), 1e-11)
    jacobian = JacobianOperator(objective)
    assert_close(jacobian @ real(len(H)), J @ real(len(H)), 1e-11)
    assert_close(jacobian.T @ real(len(J)), J.T @ real(len(J)), 1e-11)
    (lin,) = objective.linearizations()
    assert (lin._chain is not None) == in_chain
    assert not objective.trust.revoked
    return objective


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_give_what_autograd_does(name: str, loss: str) -> None:
    criterion, targets = LOSSES[loss]
    objective = check_all(CHAINS[name](), criterion, (real(N, 4, seed=5), targets), True)
    assert len(objective.notes) > len(objective.kept)  # that it was compared


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_blocks_and_batches(matrix: type[HessianOperator]) -> None:
    model, x = deep(nn.Identity()), real(N, 4, seed=5)
    data = [(x[:7], CLASSES[:7]), (x[7:], CLASSES[7:])]
    whole = matrix(Objective(model, nn.CrossEntropyLoss(), (x, CLASSES)))
    cut = matrix(Objective(model, nn.CrossEntropyLoss(), data, keep_graphs=False))
    dense = whole.to_dense()
    assert_close(cut.to_dense(), dense, 1e-11)
    assert_close(whole.restrict("0.*").to_dense(), dense[:30, :30], 1e-11)
    assert_close(whole @ real(len(dense)), dense @ real(len(dense)), 1e-11)  # after another block's graph was built


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(torch.tanh(self.inner(x)))
        return z[:, :3]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        z: Tensor = self.out(h + self.inner(h))
        return z


class Scaled(nn.Module):
    """A weight that is a function of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Parameter(real(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(x)), 2 * self.out)


class Beside(nn.Module):
    """A bias for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(4, 3), nn.Parameter(real(N, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.shift, x, self.inner.weight.T) + self.inner.bias


class OneForAll(nn.Module):
    """A bias (1,) for all three outputs, which addmm broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(real(3, 4)), nn.Parameter(real(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.T)


class Product(torch.autograd.Function):
    """h w for a tensor w of the batch's size, under the name of one of the lean functions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, w = ctx.saved_tensors
        return g * w, g * h


LikeLean: Any = type("Activation", (Product,), {})
assert LikeLean._backward_cls.__name__ == "ActivationBackward"


class Gated(nn.Module):
    """Multiplied by a function of itself, in a function whose node is named as a lean one's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        z: Tensor = self.out(LikeLean.apply(h, h.sin()))
        return z


@pytest.mark.parametrize("kind", [Tied, Residual, Scaled, Beside, OneForAll, Gated])
def test_what_is_no_chain_stays_with_autograd(kind: type[nn.Module]) -> None:
    torch.manual_seed(2)
    check_all(kind().double(), nn.CrossEntropyLoss(), (real(N, 4, seed=5), CLASSES), False)


def test_weighted_products_are_no_chain() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.inner.bias, x, self.inner.weight.T, alpha=0.5, beta=3.0)

    check_all(Weighted().double(), nn.CrossEntropyLoss(), (real(N, 4, seed=5), CLASSES), False)


def test_targets_that_are_made_of_the_outputs_are_no_chain() -> None:
    model, x = perceptron(nn.Tanh()), real(N, 4, seed=5)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        z = model(batch[0])
        return z, z.softmax(1)

    H = dense_hessian(lambda: F.cross_entropy(*forward(model, (x,))), list(model.parameters()))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, CLASSES), forward=forward, keep_graphs=True)
    assert_close(HessianOperator(objective).to_dense(), H, 1e-11)


def test_a_loss_with_parameters_is_no_chain() -> None:
    model = perceptron(nn.Tanh())

    class Penalised(nn.MSELoss):
        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            return super().forward(z, target) + sum(p.square().sum() for p in model.parameters())

    data = (real(N, 4, seed=5), real(N, 3, seed=6))
    H = dense_hessian(lambda: Penalised()(model(data[0]), data[1]), list(model.parameters()))
    assert_close(HessianOperator(Objective(model, Penalised(), data)).to_dense(), H, 1e-11)


def test_the_point_moves_and_the_chain_with_it() -> None:
    model, loss, data = perceptron(nn.Tanh()), nn.CrossEntropyLoss(), (real(N, 4, seed=5), CLASSES)
    H = HessianOperator(Objective(model, loss, data, keep_graphs=True))
    for write in (lambda p: p.data.mul_(1.5), lambda p: p.detach().numpy().__imul__(0.5)):
        H @ real(H.shape[0])
        write(model[0].weight)
        dense = matrices(model, loss, data)[0]
        assert_close(H @ real(H.shape[0]), dense @ real(H.shape[0]), 1e-11)


def test_a_slope_that_is_not_finite_is_refused() -> None:
    class Root(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.sqrt()

    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), Root(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    data = (real(N, 4, seed=5), CLASSES)
    with pytest.raises(NonFiniteError):
        HessianOperator(Objective(model, nn.CrossEntropyLoss(), data)) @ real(68)


def wrong(*args: Any) -> Tensor:
    return 1.01 * RIGHT(*args)


def raises(*_: Any) -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize("fault", [wrong, raises])
@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_faults_are_found_out(
    fault: Callable[..., Tensor], matrix: type[HessianOperator], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss, data = deep(nn.Identity()), nn.CrossEntropyLoss(), (real(N, 4, seed=5), CLASSES)
    dense = matrix(Objective(model, loss, data)).to_dense()
    monkeypatch.setattr(Chain, "_backward", fault)
    objective = Objective(model, loss, data)
    assert_close(matrix(objective) @ real(len(dense)), dense @ real(len(dense)), 1e-11)
    assert objective.trust.revoked
