"""Products are those of the present point, whatever moved it; what depends on nothing or does not repeat is refused."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from curvature import GGNOperator, HessianOperator, JacobianOperator, Objective, eigsh, solve
from curvature.errors import CheckFailedError, CurvatureError, InputError, ParameterSelectionError
from curvature.layerwise import exact_diagonal
from curvature.linalg import trace
from curvature.per_example import gradient_moments
from tests.checks import assert_close

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
BETA = {"kl": 1.0}
_NOISE = itertools.count()


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.settings = net(), {"temperature": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.settings["temperature"]


def dense(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    params = list(model.parameters())
    slopes = torch.autograd.grad(loss(), params, create_graph=True)
    g = torch.cat([s.reshape(-1) for s in slopes])
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True) for e in g]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def moved_by_numpy(m: nn.Module) -> None:
    for p in m.parameters():
        p.detach().numpy()[...] += 0.3


def flipped(m: Any) -> None:
    m[0].weight.data[:, :2] *= -1.0  # an even number of signs: no XOR of words sees it


def permuted(m: Any) -> None:
    m[0].weight.data = m[0].weight.data.flip(0)


def fused(m: Any) -> None:
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)
    F.cross_entropy(m(X), Y).backward()
    optimizer.step()


MOVES: dict[str, Callable[[Any], object]] = {
    "numpy": moved_by_numpy,
    "signs": flipped,
    "permutation": permuted,
    "fused": fused,
    "assign": lambda m: m.load_state_dict(net(1).state_dict(), assign=True),
    "activation": lambda m: m.__setitem__(1, nn.Sigmoid()),
    "head": lambda m: m.__setitem__(2, nn.Linear(5, 3).double()),
    "hook": lambda m: m[1].register_forward_hook(lambda _m, _x, z: 2 * z),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_operators_follow_the_model(name: str, matrix: type[HessianOperator]) -> None:
    model = net()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    A = matrix(objective)
    v = torch.randn(A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = A @ v
    MOVES[name](model)
    fresh = matrix(Objective(model, nn.CrossEntropyLoss(), (X, Y))) @ v
    after = A @ v
    assert float((after - before).norm()) > 1e-3 * float(before.norm())
    assert_close(after, fresh, 1e-12)
    if matrix is HessianOperator:
        assert_close(after, dense(model, lambda: F.cross_entropy(model(X), Y)) @ v)


def changes() -> dict[str, tuple[nn.Module, Callable[..., Tensor], Callable[[], object]]]:
    scaled, smooth, dropout = Scaled(), nn.CrossEntropyLoss(label_smoothing=0.2), nn.Dropout(0.5)
    weights = torch.ones(3).double()
    weighted = nn.CrossEntropyLoss(weight=weights)
    held = np.ones(1)

    def closure(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) * float(held[0])

    def penalised(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + BETA["kl"] * z.square().mean()

    smoothed = partial(F.cross_entropy, label_smoothing=0.3)
    return {
        "attribute in a dict": (scaled, nn.CrossEntropyLoss(), lambda: scaled.settings.update(temperature=3.0)),
        "label smoothing": (net(), smooth, lambda: setattr(smooth, "label_smoothing", 0.0)),
        "class weights": (net(), weighted, lambda: weights.mul_(torch.tensor([5.0, 1.0, 0.1]))),
        "dropout": (nn.Sequential(net(), dropout), nn.CrossEntropyLoss(), lambda: setattr(dropout, "p", 0.0)),
        "closure over an array": (net(), closure, lambda: held.fill(3.0)),
        "global": (net(), penalised, lambda: BETA.update(kl=0.0 if BETA["kl"] else 1.0)),
        "partial": (net(), smoothed, lambda: smoothed.keywords.update(label_smoothing=0.0)),
    }


@pytest.mark.parametrize("name", changes())
def test_python_state_of_model_and_loss_counts(name: str) -> None:
    model, loss, change = changes()[name]
    objective = Objective(model, loss, (X, Y))
    H = HessianOperator(objective)
    v = torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = H @ v
    change()
    after = H @ v
    assert float((after - before).norm()) > 1e-3 * float(before.norm())
    assert_close(after, dense(model, lambda: loss(model(X), Y)) @ v)


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_how_the_loss_reduces_and_what_hooks_make_of_it_is_followed(
    matrix: type[HessianOperator | GGNOperator],
) -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    A = matrix(Objective(model, loss, [(X[:4], Y[:4]), (X[4:], Y[4:])]))
    v = torch.ones(A.shape[0], dtype=torch.float64)
    mean = A @ v
    loss.reduction = "sum"
    assert_close(A @ v, len(Y) * mean, 1e-12)
    hook = loss.register_forward_hook(lambda *sides: 3 * sides[2])
    assert_close(A @ v, 3 * len(Y) * mean, 1e-12)
    hook.remove()
    loss.reduction = "none"
    for _ in range(2):
        with pytest.raises(InputError, match="reduction must be 'mean' or 'sum', got 'none'"):
            A @ v
    loss.reduction = "mean"
    assert_close(A @ v, mean, 1e-12)


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_autocast_around_a_product_is_that_of_the_product(keep_graphs: bool) -> None:
    model, x = net().float(), X.float()
    H = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (x, Y), keep_graphs=keep_graphs))
    true = dense(model, lambda: F.cross_entropy(model(x), Y))
    for _ in range(2):
        assert_close(H.to_dense(), true, 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = H.to_dense()
        assert 1e-3 < float((rounded - true).norm() / true.norm()) < 0.1


def test_data_in_memory_are_followed() -> None:
    model, data = net(), [(X.clone(), Y), (X.clone() + 1, Y)]
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    H = HessianOperator(objective)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    H @ v
    data[0][0].mul_(2.0)
    assert_close(H @ v, HessianOperator(Objective(model, nn.CrossEntropyLoss(), list(data))) @ v, 1e-12)
    data[1] = (X - 1, Y)
    data.append((3 * X, Y))
    assert_close(H @ v, HessianOperator(Objective(model, nn.CrossEntropyLoss(), list(data))) @ v, 1e-12)
    assert objective.num_batches == 3
    data[2][0].numpy()[...] = 0.5
    assert_close(H @ v, HessianOperator(Objective(model, nn.CrossEntropyLoss(), list(data))) @ v, 1e-12)


class Counting:
    """A loader of one's own that keeps a count, made on first use."""

    def __init__(self) -> None:
        self.scale, self.x = 1.0, X.clone()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes = getattr(self, "passes", 0) + 1
        for i in range(2):
            self.place = i
            yield self.scale * self.x, Y


class Examples(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.scale = 1.0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.scale * X[i], Y[i]


def doubled(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return 2 * torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])


@pytest.mark.parametrize("change", ["own attribute", "own tensor", "dataset", "collate_fn"])
def test_loaders_are_followed(change: str) -> None:
    model, own, loader = net(), Counting(), DataLoader(Examples(), batch_size=6)
    data: Any = own if "own" in change else loader
    A = HessianOperator(Objective(model, nn.CrossEntropyLoss(), data))
    v = torch.ones(A.shape[0], dtype=torch.float64)
    for _ in range(2):
        A @ v
    {
        "own attribute": lambda: setattr(own, "scale", 2.0),
        "own tensor": lambda: own.x.data.mul_(2),
        "dataset": lambda: setattr(loader.dataset, "scale", 2.0),
        "collate_fn": lambda: setattr(loader, "collate_fn", doubled),
    }[change]()
    assert_close(A @ v, HessianOperator(Objective(model, nn.CrossEntropyLoss(), (2 * X, Y))) @ v, 1e-12)


def test_selections_are_names() -> None:
    model = net()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), params="2.*")
    head = objective.restrict("2.bias")
    model[2] = nn.Linear(5, 3).double()
    assert all(a is b for a, b in zip(objective.space.tensors.values(), model[2].parameters(), strict=True))
    assert head.space.tensors["2.bias"] is model[2].bias
    model[2] = nn.Linear(5, 4).double()
    with pytest.raises(InputError, match="had shape"):
        objective.gradient()
    model[2] = nn.Identity()
    with pytest.raises(ParameterSelectionError, match="no longer in the model"):
        objective.gradient()
    other = net()
    objective = Objective(other, nn.CrossEntropyLoss(), (X, Y))
    other.float()
    with pytest.raises(InputError, match="build a new Objective"):
        objective.gradient()


@pytest.mark.parametrize("kept", [True, False])
def test_state_that_forward_changes_by_itself_costs_no_graphs(kept: bool) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.last, self.log = net(), 0, X, [0.0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.net(x)
            self.log.append(float(self.calls))
            return self.last

    model = Counts()
    objective = Objective(model, nn.CrossEntropyLoss(), [(X, Y), (X, Y)], keep_graphs=kept)
    found = eigsh(objective, 1, generator=torch.Generator().manual_seed(0))
    true = torch.linalg.eigvalsh(dense(model, lambda: F.cross_entropy(model(X), Y)))[-1]
    assert_close(found.eigenvalues[0], true, 1e-4)
    assert objective.keeps_all_graphs == kept


# -- forward passes that do not repeat --------------------------------------------------------------------------------


def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]) * (1 + 0.1 * (next(_NOISE) % 7)), batch[1]


@pytest.mark.parametrize("kept", [True, False])
def test_answers_of_forwards_that_do_not_repeat_are_refused(kept: bool) -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(), [(X, Y)], forward=noisy, keep_graphs=kept)
    for ask in (
        lambda: eigsh(objective, 1, generator=torch.Generator().manual_seed(0)),
        lambda: trace(HessianOperator(objective), num_matvecs=4, generator=torch.Generator().manual_seed(0)),
        lambda: exact_diagonal(objective),
    ):
        with pytest.raises(CheckFailedError, match="at the same parameters differ"):
            ask()


def test_a_point_that_moves_within_a_run_is_refused() -> None:
    model: Any = net()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))

    def callback(*_: object) -> None:
        model[0].weight.data.mul_(1.01)

    b = torch.ones(objective.num_params, dtype=torch.float64)
    with pytest.raises(CheckFailedError, match="values of parameters"):
        solve(objective, b, matrix="ggn", damping=1.0, callback=callback)


# -- losses that depend on nothing ------------------------------------------------------------------------------------


def detached(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(batch[0]), batch[1]


def elsewhere(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return copy.deepcopy(model).requires_grad_(True)(batch[0]), batch[1]


@pytest.mark.parametrize(("forward", "why"), [(detached, "no gradient was recorded"), (elsewhere, "other tensors")])
def test_zeros_of_losses_that_depend_on_nothing_are_errors(forward: Callable[..., object], why: str) -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(), (X, Y), forward=forward)
    v = torch.ones(objective.num_params, dtype=torch.float64)
    objective.loss()
    for ask in (
        objective.gradient,
        lambda: HessianOperator(objective) @ v,
        lambda: GGNOperator(objective) @ v,
        lambda: JacobianOperator(objective) @ v,
        lambda: exact_diagonal(objective),
        lambda: gradient_moments(objective),
        objective.check,
    ):
        with pytest.raises(CurvatureError, match=why):
            ask()


def test_zeros_that_are_right_stay() -> None:
    linear = nn.Linear(4, 1).double()
    objective = Objective(linear, None, [X], forward=lambda m, x: m(x).mean())
    v = torch.ones(objective.num_params, dtype=torch.float64)
    assert float((HessianOperator(objective) @ v).norm()) == 0 < float(objective.gradient().norm())
    model: Any = net()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    part = Objective(model, nn.CrossEntropyLoss(), (X, Y)).restrict("unused")
    assert float(part.gradient().norm()) == 0


@pytest.mark.parametrize("write", ["add_", "data", "numpy"])
def test_a_change_within_a_run_is_an_error_however_soon_it_comes(write: str) -> None:
    """Looks within a run are rarer than products; the run looks once more before it answers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    weight = model[0].weight

    def move(done: int, _: str) -> None:
        if done == 5:
            with torch.no_grad():
                if write == "add_":
                    weight.add_(0.1)
                elif write == "data":
                    weight.data.mul_(1.1)
                else:
                    weight.detach().numpy()[0] += 0.1

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(CheckFailedError, match="changed while products with one matrix went on"):
        eigsh(objective, 3, method="lanczos", generator=generator, callback=move)


# -- what no look sees ------------------------------------------------------------------------------------------------


def told(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]) * float(os.environ["SCALE_OF_TEST"]), batch[1]


def test_a_dense_matrix_of_a_function_that_changed_unseen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvature.objective.freshness._SHARE", 1e-9)  # no repeat at the start of a walk
    monkeypatch.setenv("SCALE_OF_TEST", "1")
    model = net()
    H = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (X, Y), forward=told))
    assert_close(H.to_dense(), dense(model, lambda: F.cross_entropy(model(X), Y)))
    monkeypatch.setenv("SCALE_OF_TEST", "2")
    with pytest.raises(CheckFailedError, match="cannot be seen from outside"):
        H.to_dense()
    true = dense(model, lambda: F.cross_entropy(2 * model(X), Y))
    assert_close(H.to_dense(), true)
    assert_close((H + H).to_dense(), 2 * true)


@pytest.mark.parametrize("release", [True, False])
def test_the_check_evaluates_what_is_kept(monkeypatch: pytest.MonkeyPatch, release: bool) -> None:
    monkeypatch.setenv("SCALE_OF_TEST", "1")
    model = net()
    objective = Objective(model, nn.CrossEntropyLoss(), [(X, Y), (X + 1, Y)], forward=told)
    H = HessianOperator(objective)
    v = torch.ones(objective.num_params, dtype=torch.float64)
    H @ v
    assert objective.check().passed
    monkeypatch.setenv("SCALE_OF_TEST", "2")
    if release:
        objective.release()
    else:
        with pytest.raises(CheckFailedError, match="products since then may be of the function as it was"):
            objective.check()
    assert objective.check().passed
    true = dense(model, lambda: (F.cross_entropy(2 * model(X), Y) + F.cross_entropy(2 * model(X + 1), Y)) / 2)
    assert_close(H @ v, true @ v)
