"""Examples that are compared with each other, and losses that divide by something else than their batches count by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import EmpiricalFisherOperator, HessianOperator, Objective
from curvature.errors import DataError, InputError
from curvature.per_example import gradient_norms, per_example_gradients
from tests.checks import assert_close
from tests.references import dense_hessian, flat_gradient

N = 12
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    X, Y, R = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,)), torch.randn(N, 3, dtype=torch.float64)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *layers, nn.Tanh(), nn.Linear(5, 3)).double()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """Each output is the positive of its own target's embedding, the other outputs of the batch are negatives."""
    anchors = F.one_hot(y, 3).to(z)
    return F.cross_entropy(z @ anchors.T, torch.arange(len(z)))


def cox(z: Tensor, y: Tensor) -> Tensor:
    risk = z[:, 0][y.argsort(descending=True, stable=True)]
    return (risk.logcumsumexp(0) - risk).mean()


def ranking(z: Tensor, y: Tensor) -> Tensor:
    gaps = z[:, 0, None] - z[None, :, 0]
    return F.softplus(-gaps)[y[:, None] > y[None, :]].sum() / max(1, int((y[:, None] > y[None, :]).sum()))


def neighbours(z: Tensor, y: Tensor) -> Tensor:
    pairs = z[: len(z) // 2 * 2].view(-1, 2, 3)
    return (pairs[:, 0] - pairs[:, 1]).square().mean() + F.cross_entropy(z, y)


def decorrelated(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 1e-3 * (z - z.mean(0)).square().mean()


class MixedInBackward(torch.autograd.Function):
    """The identity, whose derivative is mixed over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return grads[0] - grads[0].mean(0)


CE = nn.CrossEntropyLoss()
COUPLED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "batch norm in train mode": (lambda: net(nn.BatchNorm1d(5)), CE),
    "batch norm without running statistics": (lambda: net(nn.BatchNorm1d(5, track_running_stats=False)).eval(), CE),
    "centred over the batch": (lambda: net(Lambda(lambda h: h - h.mean(0))).eval(), CE),
    "softmax over the batch": (lambda: net(Lambda(lambda h: h * h.softmax(0))).eval(), CE),
    "mixed at random": (lambda: net(nn.Dropout(0.2), Lambda(lambda h: 0.7 * h + 0.3 * h[torch.randperm(len(h))])), CE),
    "derivatives mixed": (lambda: net(Lambda(MixedInBackward.apply)).eval(), CE),
    "contrastive": (net, contrastive),
    "Cox": (net, cox),
    "ranking": (net, ranking),
    "pairs of neighbours": (net, neighbours),
    "weakly coupled": (net, decorrelated),
    "root of a mean": (net, lambda z, y: F.cross_entropy(z, y).sqrt()),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_examples_are_refused(name: str) -> None:
    build, loss = COUPLED[name]
    model = build()
    objective = Objective(model, loss, (X, Y))
    for call in (
        lambda: gradient_norms(objective),
        lambda: next(iter(per_example_gradients(Objective(model, loss, (X, Y))))),
        lambda: EmpiricalFisherOperator(objective) @ torch.ones(objective.num_params, dtype=torch.float64),
        lambda: Objective(model, loss, (X, Y), micro_batch=5).loss(),
        lambda: objective.split(5).gradient(),
        lambda: list(objective.split(5).batches()),
    ):
        with pytest.raises(
            (DataError, InputError), match=r"gradient of its own|micro_batch= would change|couples its examples"
        ):
            call()
    loader = DataLoader(TensorDataset(X, Y), 6, shuffle=True, generator=torch.Generator().manual_seed(0))
    for keep in (False, True):  # graphs of one draw do not stand for all
        shuffled = Objective(model, loss, loader, keep_graphs=keep)
        shuffled.loss()
        with pytest.raises(DataError, match="the loader shuffles and"):
            shuffled.loss()
    fixed = Objective(model, loss, list(loader), keep_graphs=False)
    assert fixed.loss() == fixed.loss()
    if name != "derivatives mixed":  # whose first derivative is wrong
        assert "Per-example quantities, micro_batch= and new batches" in fixed.check().messages[-1]


ALONE: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "layer norm": (lambda: net(nn.LayerNorm(5)), CE),
    "batch norm in eval mode": (lambda: net(nn.BatchNorm1d(5)).eval(), CE),
    "class weights": (net, nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64))),
    "ignored": (net, nn.CrossEntropyLoss(ignore_index=1)),
    "own mean": (net, lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()),
    "sum": (net, nn.CrossEntropyLoss(reduction="sum")),
}


@pytest.mark.parametrize("name", ALONE)
def test_functions_of_their_own_are_not_refused(name: str) -> None:
    build, loss = ALONE[name]
    model = build()
    params = list(model.parameters())
    H = dense_hessian(lambda: loss(model(X), Y), params)
    assert_close(HessianOperator(Objective(model, loss, (X, Y), micro_batch=5)).to_dense(), H, 1e-10)
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    shuffled = Objective(model, loss, loader, keep_graphs=False)
    for _ in range(2):
        assert_close(shuffled.gradient(), flat_gradient(loss(model(X), Y), params), 1e-12)
    norms = gradient_norms(Objective(model, loss, (X, Y)))
    assert_close(norms.mean, flat_gradient(loss(model(X), Y), params), 1e-12)
    assert "those of its parts" in Objective(model, loss, (X, Y)).check().messages[-1]


def test_dropout_may_be_cut() -> None:
    objective = Objective(net(nn.Dropout(0.5)), CE, (X, Y), micro_batch=5)
    assert objective.loss() == objective.loss()
    assert gradient_norms(Objective(net(nn.Dropout(0.5)), CE, (X, Y))).num_examples == N


def test_a_verdict_belongs_to_a_mode() -> None:
    model = net(nn.BatchNorm1d(5))
    objective = Objective(model, CE, (X, Y))
    with pytest.raises(DataError, match=r"couples the examples .* call model\.eval\(\)"):
        gradient_norms(objective)
    model.eval()
    gradient_norms(objective)
    model.train()
    with pytest.raises(DataError, match="couples the examples"):
        gradient_norms(objective)


def test_a_converged_model_is_not_taken_for_a_coupled_one() -> None:
    """Its losses and gradients are rounding; its outputs are not."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(200)
    x = X.float()
    objective = Objective(model, CE, (x, model(x).argmax(1)), micro_batch=5)
    objective.gradient()


# -- weights ----------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.loss(z, y)

    def count(self, y: Tensor) -> float:
        assert self.loss.weight is not None
        return float(self.loss.weight[y].sum())


PADDED = Y.clone()
PADDED[:4] = 0
PADDED[4:] = 1 + PADDED[4:] % 2
MISSING = R.clone()
MISSING[:6, 0] = torch.nan  # of every example of the first batch, and of none of the second
LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Callable[[Tensor], float]]] = {
    "pad id": (lambda z, y: F.cross_entropy(z, y, ignore_index=0), PADDED, lambda y: float((y != 0).sum())),
    "wrapped class weights": (Wrapped(), Y, Wrapped().count),
    "missing entries": (
        lambda z, y: (z - y.nan_to_num()).square()[~y.isnan()].mean(),
        MISSING,
        lambda y: float((~y.isnan()).sum()),
    ),
}


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_that_are_not_known(name: str, keep_graphs: bool) -> None:
    loss, y, count = LOSSES[name]
    model = net()
    data = [(X[:6], y[:6]), (X[6:], y[6:])]
    for call in (Objective.loss, Objective.gradient, Objective.check):
        with pytest.raises(DataError, match=r"how much each batch counts is not known: .* Pass weight="):
            call(Objective(model, loss, data, keep_graphs=keep_graphs))
    stated = Objective(model, loss, data, weight=lambda batch: count(batch[1]), keep_graphs=keep_graphs)
    expected = loss(model(X), y)
    assert_close(stated.loss(), expected.detach(), 1e-12)
    assert_close(HessianOperator(stated).to_dense(), dense_hessian(lambda: loss(model(X), y), list(model.parameters())))
    assert stated.check().passed
    assert_close(Objective(model, loss, (X, y)).loss(), expected.detach(), 1e-12)  # one batch needs no weight
    if name != "missing entries":
        with pytest.raises(DataError, match="the share of each example in the loss is not known"):
            gradient_norms(Objective(model, loss, (X, y)))


def test_losses_that_add_up() -> None:
    model = net()
    data = [(X[:8], R[:8]), (X[8:], R[8:])]
    with pytest.raises(DataError, match="adds up over a batch instead of averaging"):
        Objective(model, lambda z, y: (z - y).square().sum(), data).loss()

    def stated(z: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
        del reduction
        return (z - y).square().sum()

    assert_close(Objective(model, stated, data).loss(), stated(model(X), R).detach(), 1e-12)


def test_losses_of_the_models_own() -> None:
    """Of forward functions that return the loss itself."""
    model = net()

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)

    data = [(X[6:], PADDED[6:]), (X[:6], PADDED[:6])]
    with pytest.raises(DataError, match=r"how much each batch counts is not known: .* Pass weight="):
        Objective(model, None, data, forward=forward).loss()
    stated = Objective(model, None, data, forward=forward, weight=lambda batch: float((batch[1] != 0).sum()))
    assert_close(stated.loss(), forward(model, (X, PADDED)).detach(), 1e-12)


def test_an_ignored_batch_of_a_subclass_counts_nothing() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, *given: Tensor) -> Tensor:
            outputs, targets = given
            return 2 * F.cross_entropy(outputs, targets, ignore_index=self.ignore_index)

    model = net()
    ignored = torch.full((3,), -100)
    objective = Objective(model, Own(), [(X[:9], Y[:9]), (X[9:], ignored)])
    assert_close(objective.loss(), 2 * CE(model(X[:9]), Y[:9]).detach(), 1e-12)
    assert objective.total_weight == 9


class Tokens(nn.Module):
    """Logits of all places of all texts, one after another."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.embedding, self.head, self.mixes = nn.Embedding(7, 5), nn.Linear(5, 7), mixes

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).tanh()
        return self.head(x - x.mean(0) if self.mixes else x).flatten(0, 1)


def test_targets_that_are_flattened_over_places_belong_to_their_examples() -> None:
    model, loss = Tokens().double(), nn.CrossEntropyLoss()
    x, y = torch.randint(7, (6, 4)), torch.randint(7, (24,))
    objective = Objective(model, loss, (x, y))
    alone = [loss(model(x[i : i + 1]), y[4 * i : 4 * i + 4]) for i in range(6)]
    gradients = torch.stack([flat_gradient(value, [*model.parameters()]) for value in alone])
    assert_close(gradient_norms(objective).squared_norms, gradients.square().sum(1))
    assert_close(objective.gradient(), gradients.mean(0))
    assert_close(objective.split(4).gradient(), gradients.mean(0))
    for use in (lambda o: gradient_norms(o), lambda o: o.split(4).gradient()):
        with pytest.raises((DataError, InputError), match=r"gradient of its own|micro_batch= would change"):
            use(Objective(Tokens(mixes=True).double(), loss, (x, y)))
