"""What the objective is: how batches count, what is kept, what it notices, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import DataError, InputError
from curvature.layerwise import exact_diagonal
from curvature.per_example import gradient_norms
from tests.checks import BATCHING_TOLERANCE, assert_close, assert_untouched
from tests.references import dense_hessian, flat_gradient

SPLIT = (4, 2, 1)
WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
Loss = Callable[..., Tensor]


def net(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, outputs)).double()


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = real(7, 4)
Y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
IGNORED = torch.tensor([0, -100, 2, 1, -100, 2, 2])


def cut(y: Tensor, x: Tensor = X) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(SPLIT), y.split(SPLIT), strict=True))


# -- weights ----------------------------------------------------------------------------------------------------------

BITS = (real(7, 3, seed=3) > 0).double()
REDUCTIONS: dict[str, tuple[Loss, Tensor, Loss, float]] = {  # loss, targets, the sum it reduces, denominator
    "classes": (nn.CrossEntropyLoss(), Y, lambda z, y: F.cross_entropy(z, y, reduction="sum"), 7),
    "ignored": (nn.CrossEntropyLoss(), IGNORED, lambda z, y: F.cross_entropy(z, y, reduction="sum"), 5),
    "ignore_index": (
        nn.CrossEntropyLoss(ignore_index=2),
        Y,
        lambda z, y: F.cross_entropy(z, y, reduction="sum", ignore_index=2),
        4,
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS),
        IGNORED,
        lambda z, y: F.cross_entropy(z, y, WEIGHTS, reduction="sum"),
        0.5 + 2.0 + 3 * 1.5,
    ),
    "smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        IGNORED,
        lambda z, y: F.cross_entropy(z, y, reduction="sum", label_smoothing=0.2),
        5,
    ),
    "smoothing, class weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
        Y,
        lambda z, y: F.cross_entropy(z, y, WEIGHTS, reduction="sum", label_smoothing=0.2),
        2 * 0.5 + 2 * 2.0 + 3 * 1.5,
    ),
    "probabilities": (
        nn.CrossEntropyLoss(),
        real(7, 3, seed=2).softmax(1),
        lambda z, y: -(y * z.log_softmax(1)).sum(),
        7,
    ),
    "bce pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        BITS,
        lambda z, y: -(WEIGHTS * y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).sum(),
        21,
    ),
    "squared error": (nn.MSELoss(), real(7, 3, seed=4), lambda z, y: (z - y).square().sum(), 21),
    "absolute error": (nn.L1Loss(), real(7, 3, seed=4), lambda z, y: (z - y).abs().sum(), 21),
    "own": (lambda z, y: (z - y).pow(4).sum(1).mean(), real(7, 3, seed=4), lambda z, y: (z - y).pow(4).sum(), 7),
    "sum": (nn.MSELoss(reduction="sum"), real(7, 3, seed=4), lambda z, y: (z - y).square().sum(), 1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_batches_count_by_their_loss_terms(name: str) -> None:
    loss, y, summed, terms = REDUCTIONS[name]
    model = net()
    params = list(model.parameters())
    objective = Objective(model, loss, cut(y))
    expected = summed(model(X), y) / terms
    assert_close(objective.loss(), expected.detach(), 1e-12)
    assert_close(objective.gradient(), flat_gradient(expected, params), 1e-12)
    hessian = dense_hessian(lambda: summed(model(X), y) / terms, params)
    assert_close(HessianOperator(objective).to_dense(), hessian)
    assert objective.total_weight == pytest.approx(3 if name == "sum" else terms)  # of a sum every batch counts once


def test_batch_in_which_everything_is_ignored_counts_nothing() -> None:
    y = IGNORED.clone()
    y[4:6] = -100  # the second batch: its mean is 0/0
    model = net()
    whole, ragged = (Objective(model, nn.CrossEntropyLoss(), d) for d in ((X, y), cut(y)))
    assert_close(ragged.gradient(), whole.gradient(), BATCHING_TOLERANCE)
    v = real(whole.num_params)
    for operator in (HessianOperator, GGNOperator):
        assert_close(operator(ragged) @ v, operator(whole) @ v, BATCHING_TOLERANCE)


def test_own_weight() -> None:
    model, y = net(), real(7, 3)
    factors = {4: 0.25, 2: 3.0, 1: 0.0}
    objective = Objective(model, nn.MSELoss(), cut(y), weight=lambda batch: factors[len(batch[0])])
    parts = [factors[len(x)] * F.mse_loss(model(x), t) for x, t in cut(y)]
    assert_close(objective.loss(), torch.stack(parts).sum().detach() / 3.25, 1e-12)
    assert objective.total_weight == 3.25
    hessian = dense_hessian(
        lambda: (0.25 * F.mse_loss(model(X[:4]), y[:4]) + 3.0 * F.mse_loss(model(X[4:6]), y[4:6])) / 3.25,
        list(model.parameters()),
    )
    assert_close(HessianOperator(objective).to_dense(), hessian)


class Masked(Tensor):
    """Entries below zero are padding, which sums leave out."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.sum:
            return args[0].as_subclass(Tensor).clamp_min(0).sum()
        return super().__torch_function__(func, types, args, kwargs or {})


def test_own_weight_of_tensors_with_ways_of_their_own() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    lengths = torch.tensor([2.0, -100.0, 3.0, 1.0, 1.0, -100.0]).double()
    data = [
        {"x": x[i : i + 3], "y": y[i : i + 3], "more": [lengths[i : i + 3].as_subclass(Masked)]}  # type: ignore[arg-type]
        for i in (0, 3)
    ]
    model = nn.Linear(3, 1).double()
    objective = Objective(
        model,
        nn.MSELoss(),
        data,
        forward=lambda model, batch: (model(batch["x"]), batch["y"]),
        weight=lambda batch: float(batch["more"][0].sum()),
    )
    losses = [float((model(x[i : i + 3]) - y[i : i + 3]).detach().square().mean()) for i in (0, 3)]
    assert float(objective.loss()) == pytest.approx((5 * losses[0] + 2 * losses[1]) / 7, rel=1e-12)


def test_weight_overrides_the_sum_of_a_summed_loss() -> None:
    model, y = net(), real(7, 3)
    objective = Objective(model, nn.MSELoss(reduction="sum"), cut(y), weight=lambda _: 1.0)
    assert_close(objective.loss(), F.mse_loss(model(X), y, reduction="sum").detach() / 3, 1e-12)


def test_forward_that_returns_the_loss() -> None:
    model = net()
    data = [{"x": x, "y": y} for x, y in cut(Y)]
    objective = Objective(model, None, data, forward=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))
    assert_close(objective.loss(), F.cross_entropy(model(X), Y).detach(), 1e-12)
    expected = dense_hessian(lambda: F.cross_entropy(model(X), Y), list(model.parameters()))
    assert_close(HessianOperator(objective).to_dense(), expected)


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("budget", ["nothing", "one batch", "everything"])
def test_memory_budget(budget: str, operator: type[HessianOperator | GGNOperator]) -> None:
    model = net()
    v = real(Objective(model, nn.CrossEntropyLoss(), (X, Y)).num_params)
    expected = operator(Objective(model, nn.CrossEntropyLoss(), (X, Y), keep_graphs=False)) @ v
    one = Objective(model, nn.CrossEntropyLoss(), cut(Y)[0])
    assert_close(operator(one) @ v, operator(one) @ v)
    size = {"nothing": 0, "one batch": int(1.2 * one.held_bytes), "everything": 2**30}[budget]
    objective = Objective(model, nn.CrossEntropyLoss(), cut(Y), memory_budget=size)
    for _ in range(3):
        assert_close(operator(objective) @ v, expected, BATCHING_TOLERANCE)
        assert objective.held_bytes <= size
    kept = [note for note in objective.notes if "kept" in note]
    if budget == "nothing":
        assert objective.held_bytes == 0
        assert kept == []
    else:
        assert ("1 of 3" if budget == "one batch" else "all 3") in kept[0]
    objective.release()
    assert objective.held_bytes == 0


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches(size: int) -> None:
    model = net()
    whole = Objective(model, nn.CrossEntropyLoss(), (X, IGNORED))
    pieces = Objective(model, nn.CrossEntropyLoss(), cut(IGNORED), micro_batch=size)
    v = real(whole.num_params)
    for operator in (HessianOperator, GGNOperator):
        assert_close(operator(pieces) @ v, operator(whole) @ v, BATCHING_TOLERANCE)
    assert pieces.num_batches == sum(-(-n // size) for n in SPLIT)


def test_kept_graphs_are_not_built_again() -> None:
    model = net()
    calls = []  # a batch is evaluated again now and then, without a graph
    model.register_forward_hook(lambda _m, _x, outputs: calls.append(1) if outputs.requires_grad else None)
    operator = HessianOperator(Objective(model, nn.CrossEntropyLoss(), cut(Y), keep_graphs=True))
    v = real(operator.shape[0])
    first = operator @ v
    made = len(calls)
    assert_close(operator @ v, first, BATCHING_TOLERANCE)
    assert len(calls) == made > 0


# -- loaders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_graphs", [True, False, "some"])
def test_shuffling_loader(keep_graphs: Any) -> None:
    model = net()
    settings: dict[str, Any] = {"keep_graphs": keep_graphs}
    if keep_graphs == "some":  # then a kept graph may be of another batch than the loader yields in its place
        one = Objective(model, nn.CrossEntropyLoss(), (X[:3], Y[:3]))
        HessianOperator(one).to_dense()
        settings = {"memory_budget": int(1.5 * one.held_bytes)}
    shuffler = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=shuffler)
    whole = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    objective = Objective(model, nn.CrossEntropyLoss(), loader, **settings)
    assert objective.num_batches is None
    v = real(whole.num_params)
    for _ in range(4):
        for operator in (HessianOperator, GGNOperator):
            assert_close(operator(objective) @ v, operator(whole) @ v, BATCHING_TOLERANCE)
            assert (objective.held_bytes > 0) == (keep_graphs is not False)
    assert objective.num_batches == 3


# -- the point --------------------------------------------------------------------------------------------------------


def _step(model: nn.Sequential) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)


def _step_one(model: nn.Sequential) -> None:
    with torch.no_grad():
        model.get_parameter("3.bias").mul_(1.5)


def _load(model: nn.Sequential) -> None:
    model.load_state_dict({name: 0.5 * t for name, t in model.state_dict().items()})


def _replace_data(model: nn.Sequential) -> None:
    weight = model.get_parameter("0.weight")
    weight.data = 2 * weight.data


def _move_buffer(model: nn.Sequential) -> None:
    model.get_buffer("1.running_mean").add_(0.5)


def _train(model: nn.Sequential) -> None:
    model[1].train()


def _optimise(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("change", [_step, _step_one, _load, _replace_data, _move_buffer, _train, _optimise])
def test_changes_of_the_model_are_noticed(change: Callable[[nn.Sequential], None], keep_graphs: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), keep_graphs=keep_graphs)
    v = real(objective.num_params)
    operators = HessianOperator(objective), GGNOperator(objective)
    before = [operator @ v for operator in operators]
    loss_before = objective.loss()
    change(model)
    fresh = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    assert_close(objective.loss(), fresh.loss(), BATCHING_TOLERANCE)
    assert abs(float(objective.loss() - loss_before)) > 1e-4
    for operator, kind, old in zip(operators, (HessianOperator, GGNOperator), before, strict=True):
        assert_close(operator @ v, kind(fresh) @ v, BATCHING_TOLERANCE)
        assert float((operator @ v - old).norm()) > 1e-4 * float(old.norm())


# -- restriction ------------------------------------------------------------------------------------------------------


def test_restricted_objective_is_the_same_function_of_fewer_parameters() -> None:
    model = net()
    objective = Objective(model, nn.CrossEntropyLoss(), cut(IGNORED))
    restricted = objective.restrict(model.get_submodule("2"))
    assert restricted.space.names == ("2.weight", "2.bias")
    assert_close(restricted.loss(), objective.loss(), BATCHING_TOLERANCE)
    assert_close(restricted.gradient(), objective.gradient()[25:], BATCHING_TOLERANCE)
    assert_close(
        HessianOperator(restricted).to_dense(), HessianOperator(objective).to_dense()[25:, 25:], BATCHING_TOLERANCE
    )
    assert restricted.restrict("*.bias").space.names == ("2.bias",)


def test_parameters_that_require_no_gradient_can_be_chosen() -> None:
    model = net().requires_grad_(False)
    with assert_untouched(model):
        dense = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (X, Y), params="0")).to_dense()
    model.requires_grad_()
    assert_close(dense, HessianOperator(Objective(model, nn.CrossEntropyLoss(), (X, Y))).to_dense()[:25, :25])


def test_devices_that_nothing_was_tested_on_are_refused() -> None:
    with pytest.raises(InputError, match=r"lie on 'meta'.*model.to\('cpu'\)"):
        Objective(nn.Linear(2, 1, device="meta"), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))


def test_replaced_arguments() -> None:
    x, y = torch.ones(3, 2), torch.zeros(3, 1)
    objective = Objective(nn.Linear(2, 1), nn.MSELoss(), (x, y), params="bias", seed=3)
    other = objective.replace(data=(2 * x, y), keep_graphs=False)
    assert other.space.names == ("bias",)
    assert other.settings == {**objective.settings, "data": other.settings["data"], "keep_graphs": False}
    assert_close(other.loss(), F.mse_loss(objective.model(2 * x), y).detach())


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_hooks_on_gradients_are_left_out_and_left_in_place(
    matrix: type[HessianOperator | GGNOperator], keep_graphs: bool
) -> None:
    """They clip, scale or log: with them products are those of no matrix."""
    model, seen = net(), []
    A = matrix(Objective(model, nn.CrossEntropyLoss(), (X, Y), keep_graphs=keep_graphs))
    true, gradient = A.to_dense(), A.objective.gradient()
    weight = next(model.parameters())
    clip = weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    weight.register_hook(seen.append)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    linear.register_full_backward_hook(lambda *sides: (3 * sides[1][0],))
    linear.register_full_backward_pre_hook(lambda *sides: (2 * sides[1][0],))
    A.objective.release()
    assert_close(A.to_dense(), true, 1e-12)
    assert_close(A.objective.gradient(), gradient, 1e-12)
    assert not seen
    nn.functional.cross_entropy(model(X), Y).backward()
    assert float(seen[0].abs().max()) <= 1e-3
    clip.remove()
    assert len(weight._backward_hooks or ()) == 1


class HooksItself(nn.Module):
    """Has a hook on what lies between its layers, registered in each forward pass."""

    def __init__(self, inner: nn.Sequential, hook: Any) -> None:
        super().__init__()
        self.inner, self.hook = inner, hook

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.inner):
            x = layer(x)
            if i == 0 and x.requires_grad:
                x.register_hook(self.hook)
        return x


@pytest.mark.parametrize("hook", [lambda g: 3 * g, lambda g: g + g.square(), lambda g: -g])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_hooks_that_forward_passes_register_are_left_out(hook: Any, keep_graphs: bool) -> None:
    model, clean = (nn.Sequential(nn.Linear(X.shape[1], 4), nn.Tanh(), nn.Linear(4, 3)).to(X.dtype) for _ in range(2))
    clean.load_state_dict(model.state_dict())
    called: list[Tensor] = []

    def watched(g: Tensor) -> Any:
        called.append(g)
        return hook(g)

    params = list(clean.parameters())
    H = dense_hessian(lambda: F.cross_entropy(clean(X), Y), params)
    g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(F.cross_entropy(clean(X), Y), params)])
    objective = Objective(HooksItself(model, watched), nn.CrossEntropyLoss(), (X, Y), keep_graphs=keep_graphs)
    plain = Objective(clean, nn.CrossEntropyLoss(), (X, Y))
    v = real(len(g))
    assert_close(objective.gradient(), g, 1e-12)
    assert_close(HessianOperator(objective) @ v, H @ v, 1e-11)
    assert_close(GGNOperator(objective) @ v, GGNOperator(plain) @ v, 1e-11)
    assert_close(exact_diagonal(objective, "hessian").value, H.diagonal(), 1e-11)
    assert_close(gradient_norms(objective).mean, g, 1e-12)
    assert not called
    F.cross_entropy(objective.model(X), Y).backward()  # training has its hooks
    assert len(called) == 1


def test_hooks_of_a_forward_pass_that_differentiates_itself_are_part_of_it() -> None:
    """The loss is the size of a gradient that a hook has scaled: without it the loss would be another."""
    model = net()
    first = next(model.parameters())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z = model(batch[0])
        z.register_hook(lambda g: 2 * g)
        (g,) = torch.autograd.grad(F.cross_entropy(z.square(), batch[1]), first, create_graph=True)
        return g.square().sum() + F.cross_entropy(z, batch[1])

    def by_hand() -> Tensor:
        z = model(X)
        (g,) = torch.autograd.grad(2 * F.cross_entropy(z.square(), Y), first, create_graph=True)
        return g.square().sum() + F.cross_entropy(z, Y)

    objective = Objective(model, None, (X, Y), forward=loss)
    assert_close(objective.loss(), by_hand().detach(), 1e-12)
    params = list(model.parameters())
    g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(by_hand(), params)])
    assert_close(objective.gradient(), g, 1e-12)


def test_hooks_of_all_modules_are_left_out() -> None:
    model = net()
    A = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (X, Y)))
    true = A.to_dense()
    handles = [
        torch.nn.modules.module.register_module_full_backward_hook(lambda *sides: (3 * sides[1][0],)),
        torch.nn.modules.module.register_module_full_backward_pre_hook(lambda *sides: (2 * sides[1][0],)),
    ]
    try:
        A.objective.release()
        assert_close(A.to_dense(), true, 1e-12)
    finally:
        for handle in handles:
            handle.remove()


def test_batches_that_are_no_pair_or_too_small_are_told() -> None:
    with pytest.raises(DataError, match=r"a batch must be a pair \(inputs, targets\), got a dict"):
        Objective(net(), nn.CrossEntropyLoss(), [{"x": X, "y": Y}]).loss()
    model = nn.Sequential(nn.Linear(X.shape[1], 3), nn.BatchNorm1d(3)).to(X.dtype)
    with pytest.raises(InputError, match="needs two examples: leave out a batch of one"):
        Objective(model, nn.CrossEntropyLoss(), [(X[:4], Y[:4]), (X[4:5], Y[4:5])]).loss()
