"""The last layer and its cross-entropy in blocks of rows, against logits that are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    MCFisherOperator,
    Objective,
)
from curvature.autograd import lazy_logits, softmax_head
from curvature.errors import InputError
from curvature.layerwise import exact_diagonal
from curvature.objective.third_order import curvature_gradient
from curvature.per_example import gradient_moments
from tests.checks import assert_close
from tests.references import dense_hessian

CLASSES, WIDTH = 7, 3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_logits, "SMALL_LOGITS", 0)
    monkeypatch.setattr(softmax_head, "BLOCK_BYTES", 1)  # 16 rows at least


class Language(nn.Module):
    """Tokens to logits; the embedding may be the weight of the head as well."""

    def __init__(self, *, bias: bool = False, tied: bool = False, finish: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.finish = finish

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.middle(self.embedding(tokens))))
        return logits if self.finish is None else self.finish(logits)


def rows_of(logits: Tensor) -> Tensor:
    return logits[:, :-1].reshape(-1, CLASSES)


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return rows_of(model(batch[0])), batch[1][:, 1:].reshape(-1)


def batch_of(seed: int, ignored: float = 0.2, size: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CLASSES, (size, 8), generator=g)
    return tokens, tokens.where(torch.rand(tokens.shape, generator=g) >= ignored, -100)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "tied": {"tied": True},
    "scaled": {"finish": lambda z: z.float().to(torch.float64) * 0.7 if z.dtype == torch.float32 else z * 0.7},
    "capped": {"bias": True, "finish": lambda z: 3.0 * torch.tanh(z / 3.0)},
    "capped and scaled": {"tied": True, "finish": lambda z: torch.tanh(2.0 * z / 3.0).mul(1.5) / 2},
    "padded": {"bias": True, "finish": lambda z: z[..., :CLASSES]},
}
LOSSES: dict[str, nn.CrossEntropyLoss] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights and smoothing": nn.CrossEntropyLoss(
        weight=torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), label_smoothing=0.2
    ),
}


def model_of(**settings: Any) -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Language(**settings).double()


def both(model: nn.Module, loss: Any, data: Any, **settings: Any) -> tuple[Objective, Objective]:
    return (
        Objective(model, loss, data, forward=forward, head="head", **settings),
        Objective(model, loss, data, forward=forward, head=None, **settings),
    )


def gauss_newton(model: nn.Module, criterion: nn.Module, data: Any) -> Tensor:
    """Return J'H J by a gradient for each logit and a second derivative of the loss for each."""
    outputs, targets = forward(model, data)
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    z = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(criterion(z, targets), z, create_graph=True)
    H = torch.stack([torch.autograd.grad(s, z, retain_graph=True)[0].flatten() for s in slope.flatten()])
    return J.T @ H @ J


def in_blocks(objective: Objective) -> bool:
    return all(lin.in_blocks for lin in objective.kept) and len(objective.kept) == objective.num_batches


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_dense_matrices(name: str, loss: str, generator: torch.Generator) -> None:
    model, criterion = model_of(**MODELS[name]), LOSSES[loss]
    data = batch_of(0)
    objective = Objective(model, criterion, data, forward=forward, head=model.head)
    params = list(model.parameters())

    def total() -> Tensor:
        outputs, targets = forward(model, data)
        return criterion(outputs, targets)

    V = torch.randn(objective.num_params, 2, dtype=torch.float64, generator=generator)
    assert_close(objective.loss(), total().detach(), 1e-12)
    gradient = torch.autograd.grad(total(), params)
    assert_close(objective.gradient(), torch.cat([g.flatten() for g in gradient]), 1e-12)
    assert_close(HessianOperator(objective) @ V, dense_hessian(total, params) @ V, 1e-10)
    assert_close(GGNOperator(objective) @ V, gauss_newton(model, criterion, data) @ V, 1e-10)
    assert in_blocks(objective), objective.notes


def test_empirical_fisher_and_blocks_of_parameters(generator: torch.Generator) -> None:
    model = model_of(bias=True)
    data = [batch_of(0), batch_of(1, 0.5), batch_of(2, 1.0)]  # the last counts nothing
    blocked, whole = both(model, LOSSES["weights and smoothing"], data)
    V = torch.randn(blocked.num_params, 2, dtype=torch.float64, generator=generator)
    for per in ("example", "target"):
        F_blocked, F_whole = (EmpiricalFisherOperator(o, per=per) for o in (blocked, whole))  # type: ignore[arg-type]
        assert_close(F_blocked @ V, F_whole @ V, 1e-10)
    for selection in ("middle", "head.bias", "embedding"):
        a, b = blocked.restrict(selection), whole.restrict(selection)
        v = V[: a.num_params]
        for operator in (HessianOperator, GGNOperator):
            assert_close(operator(a) @ v, operator(b) @ v, 1e-10)
        assert in_blocks(a)


def test_softmax_that_is_held_changes_nothing(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(softmax_head, "NARROW", WIDTH - 1)
    monkeypatch.setattr(softmax_head, "SOFTMAX_BYTES", 40 * CLASSES * 8)  # two blocks of 16 rows, and not a third
    held = []

    def room(head: softmax_head.SoftmaxHead) -> Tensor:
        held.append((made := of_class(head)).shape[0])
        return made

    of_class = softmax_head.SoftmaxHead.room_for_softmax
    monkeypatch.setattr(softmax_head.SoftmaxHead, "room_for_softmax", room)
    blocked, whole = both(model_of(bias=True), LOSSES["weights and smoothing"], [batch_of(0, size=12), batch_of(1)])
    V = torch.randn(blocked.num_params, 2, dtype=torch.float64, generator=generator)
    for operator in (GGNOperator, EmpiricalFisherOperator):
        matrix = operator(blocked)
        for _ in range(2):  # what is held is not overwritten
            assert_close(matrix @ V, operator(whole) @ V, 1e-10)
    sampled = MCFisherOperator(blocked, num_samples=3, generator=5)
    first = sampled @ V
    monkeypatch.setattr(softmax_head, "SOFTMAX_BYTES", 0)
    assert_close(first, MCFisherOperator(blocked.replace(), num_samples=3, generator=5) @ V, 1e-10)
    assert in_blocks(blocked)
    assert set(held) >= {0, 32}


def test_sampled_fisher_is_right_on_average(generator: torch.Generator) -> None:
    model = model_of(bias=True)
    blocked, whole = both(model, LOSSES["mean"], batch_of(0))
    v = torch.randn(blocked.num_params, dtype=torch.float64, generator=generator)
    drawn = MCFisherOperator(blocked, num_samples=4000, generator=generator) @ v
    assert in_blocks(blocked)
    assert_close(drawn, GGNOperator(whole) @ v, 0.1)  # the Fisher matrix of a softmax is its Gauss-Newton matrix
    few = [MCFisherOperator(blocked, num_samples=3, generator=5) @ v for _ in range(2)]
    assert torch.equal(*few)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda z: z.mul_(2.0),
    "augmented": lambda z: z.__imul__(2.0),
    "written to": lambda z: z.index_fill(-1, torch.tensor([0]), -5.0),
    "softmax": lambda z: z.log_softmax(-1),
    "another tensor": lambda z: z + torch.linspace(0, 1, 8)[:, None],
    "two caps": lambda z: torch.tanh(torch.tanh(z)),
    "a value": lambda z: z * float(z.abs().max()),
}


class Overwritten(Language):
    """Changes what goes into the head once its logits are made."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.middle(torch.tanh(self.embedding(tokens)))
        logits = self.head(rows)
        rows.mul_(2.0)
        return logits


class Constant(Language):
    """Its logits are a constant to autograd, but for a part that is added."""

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.head(torch.tanh(self.middle(self.embedding(tokens))))
        return logits + self.head.bias


@pytest.mark.parametrize("kind", [Overwritten, Constant])
def test_logits_are_those_of_the_moment_they_were_made(kind: type[Language], generator: torch.Generator) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(bias=True).double()
    selection = "head.bias" if kind is Constant else ["embedding", "middle"]  # torch refuses to differentiate the rest
    blocked, whole = both(model, LOSSES["mean"], batch_of(0), params=selection)
    v = torch.randn(blocked.num_params, dtype=torch.float64, generator=generator)
    assert torch.equal(blocked.loss(), whole.loss())
    assert_close(HessianOperator(blocked) @ v, HessianOperator(whole) @ v, 1e-12)


@pytest.mark.parametrize("how", REFUSED)
def test_what_logits_cannot_follow_leaves_them_whole(how: str, generator: torch.Generator) -> None:
    model = model_of(bias=True, finish=REFUSED[how])
    blocked, whole = both(model, LOSSES["mean"], [batch_of(0), batch_of(1)])
    v = torch.randn(blocked.num_params, dtype=torch.float64, generator=generator)
    for operator in (HessianOperator, GGNOperator):
        assert torch.equal(operator(blocked) @ v, operator(whole) @ v)
    assert not in_blocks(blocked)
    assert any("logits are held whole" in note for note in blocked.notes)


def test_errors_are_those_of_whole_logits() -> None:
    tokens, labels = batch_of(0)
    labels[1, 2] = CLASSES
    for objective in both(model_of(), LOSSES["mean"], (tokens, labels)):
        with pytest.raises(IndexError, match="out of bounds"):
            objective.loss()
    for head, said in (("nowhere", "'nowhere'"), (nn.Linear(2, 2), "does not hold"), ("middle.bias", "middle.bias")):
        with pytest.raises(InputError, match=said):
            Objective(model_of(), LOSSES["mean"], batch_of(0), forward=forward, head=head)


def test_what_needs_all_logits_gets_them(generator: torch.Generator) -> None:
    model = model_of(bias=True)
    blocked, whole = both(model, LOSSES["mean"], batch_of(0))
    v = torch.randn(blocked.num_params, dtype=torch.float64, generator=generator)
    before = GGNOperator(blocked) @ v
    assert_close(JacobianOperator(blocked) @ v, JacobianOperator(whole) @ v, 1e-12)
    assert_close(GGNOperator(blocked) @ v, before, 1e-10)
    assert_close(gradient_moments(blocked).squared_norms, gradient_moments(whole).squared_norms, 1e-10)
    assert_close(exact_diagonal(blocked, "ggn").value, exact_diagonal(whole, "ggn").value, 1e-10)
    assert blocked.check().passed
    assert_close(curvature_gradient(blocked, v), curvature_gradient(whole, v), 1e-10)


def test_weights_that_change_are_seen(generator: torch.Generator) -> None:
    model = model_of(tied=True)
    blocked, _ = both(model, LOSSES["mean"], batch_of(0))
    H = HessianOperator(blocked)
    v = torch.randn(blocked.num_params, dtype=torch.float64, generator=generator)
    H @ v
    model.embedding.weight.data.mul_(1.5)
    fresh = Objective(model, LOSSES["mean"], batch_of(0), forward=forward, head=None)
    assert_close(H @ v, HessianOperator(fresh) @ v, 1e-10)
    model.head = nn.Linear(WIDTH, CLASSES, bias=False).double()  # another layer under the same name
    untied = Objective(model, LOSSES["mean"], batch_of(0), forward=forward, head="head")
    other = Objective(model, LOSSES["mean"], batch_of(0), forward=forward, head=None)
    v = torch.randn(untied.num_params, dtype=torch.float64, generator=generator)
    assert_close(HessianOperator(untied) @ v, HessianOperator(other) @ v, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_loses_no_more_than_whole_logits(dtype: torch.dtype, generator: torch.Generator) -> None:
    model, exact = model_of(bias=True), model_of(bias=True)
    model.to(dtype)
    exact.load_state_dict(model.double().state_dict())
    model.to(dtype)
    blocked, whole = both(model, nn.CrossEntropyLoss(), batch_of(0))
    reference = Objective(exact, nn.CrossEntropyLoss(), batch_of(0), forward=forward, head=None)
    v = torch.randn(blocked.num_params, generator=generator)
    for operator in (HessianOperator, GGNOperator):
        truth = operator(reference) @ v.double()
        errors = [float(((operator(o) @ v).double() - truth).norm() / truth.norm()) for o in (blocked, whole)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6
        assert in_blocks(blocked)


def test_a_graph_of_the_second_derivative_is_refused() -> None:
    h, W = torch.randn(5, 3, dtype=torch.float64).requires_grad_(), torch.randn(4, 3, dtype=torch.float64)
    head = softmax_head.SoftmaxHead(h, W, None, torch.arange(5) % 4)
    (g,) = torch.autograd.grad(head.losses().sin().sum(), h, create_graph=True)
    torch.autograd.grad(g.sin().sum(), h, retain_graph=True)
    with pytest.raises(RuntimeError, match="holds two derivatives"):
        torch.autograd.grad(g.sin().sum(), h, create_graph=True)
