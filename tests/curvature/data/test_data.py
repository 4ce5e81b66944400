"""Loaders: what counts as the same data, as another order, and as other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import GGNOperator, HessianOperator, MCFisherOperator, NTKOperator, Objective
from curvature.data.fingerprints import fingerprint
from curvature.data.parts import small_part
from curvature.data.tensors import map_tensors, move_batch, tensors_in
from curvature.errors import DataError
from tests.checks import assert_close
from tests.references import dense_hessian

N = 12
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(3)
    X, Y = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *layers, nn.Tanh(), nn.Linear(5, 3)).double()


# -- batches of many kinds --------------------------------------------------------------------------------------------


@dataclass
class Record:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    y: Tensor
    x: Tensor


class Graphs:
    """A batch of graphs, as graph libraries have them: nodes of all graphs after another, positions that refer to them.

    Graph i has i % 3 + 1 nodes, all with the features of example i.
    """

    def __init__(self, places: list[int], x: Tensor, y: Tensor) -> None:
        self.counts = torch.tensor([i % 3 + 1 for i in places])
        self.nodes = x.repeat_interleave(self.counts, 0)
        self.graph = torch.arange(len(places)).repeat_interleave(self.counts)
        self.y = y
        self._parts = [(places[i : i + 1], x[i : i + 1], y[i : i + 1]) for i in range(len(places))]

    @property
    def x(self) -> Tensor:
        return torch.stack([self.nodes[self.graph == i].mean(0) for i in range(len(self.y))])

    def to_data_list(self) -> list[Graphs]:
        return [Graphs(*part) for part in self._parts] if len(self.y) > 1 else [self]

    @classmethod
    def from_data_list(cls, graphs: list[Graphs]) -> Graphs:
        places, x, y = zip(*(part for graph in graphs for part in graph._parts), strict=True)
        return cls([i for place in places for i in place], torch.cat(x), torch.cat(y))


def stacked(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])


KINDS: dict[str, tuple[Callable[[list[int], Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda _, x, y: (x, y), lambda b: b),
    "mapping": (lambda _, x, y: {"x": x, "more": [y]}, lambda b: (b["x"], b["more"][0])),
    "data class": (lambda _, x, y: Record(x, y), lambda b: (b.x, b.y)),
    "frozen with slots": (lambda _, x, y: Frozen(y, x), lambda b: (b.x, b.y)),
    "objects in a list": (lambda _, x, y: [Record(a, b) for a, b in zip(x, y, strict=True)],
                          lambda b: stacked([(r.x, r.y) for r in b])),
    "list of pairs": (lambda _, x, y: list(zip(x, y, strict=True)), stacked),
    "pair of lists": (lambda _, x, y: (tuple(x), tuple({"label": b} for b in y)),
                      lambda b: (torch.stack(b[0]), torch.stack([t["label"] for t in b[1]]))),
    "numbers and names": (lambda p, x, y: (x, y.tolist(), [str(i) for i in p], "train"),
                          lambda b: (b[0], torch.tensor(b[1]))),
    "arrays": (lambda _, x, y: {"x": x.numpy(), "y": y.numpy()},
               lambda b: (torch.tensor(b["x"]), torch.tensor(b["y"]))),
    "graphs": (Graphs, lambda b: (b.x, b.y)),
}  # fmt: skip


class Loader:
    """Yields batches of a kind; each pass in a new order, or with other content."""

    def __init__(self, kind: str, *, shuffle: bool = False, noise: float = 0.0, partners: bool = False) -> None:
        self.build = KINDS[kind][0]
        self.shuffle, self.noise, self.partners = shuffle, noise, partners
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N, generator=self.generator) if self.shuffle else torch.arange(N)
        x = X + self.noise * torch.randn(X.shape, generator=self.generator, dtype=X.dtype)
        y = Y[torch.randperm(N, generator=self.generator)] if self.partners else Y
        for places in order.split(5):
            yield self.build(places.tolist(), x[places], y[places])


def objective_of(kind: str, loader: Any, model: nn.Module | None = None, **settings: Any) -> Objective:
    unpack = KINDS[kind][1]

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = unpack(batch)
        return model(x), y

    return Objective(model or net(), nn.CrossEntropyLoss(), loader, forward=forward, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_sums_over_shuffled_batches(kind: str, share: float) -> None:
    """The Hessian is that of all data, whether no graphs are kept, one or two of three, or all."""
    model = net()
    params = list(model.parameters())
    V = torch.randn(sum(p.numel() for p in params), 2, dtype=torch.float64)
    HV = dense_hessian(lambda: F.cross_entropy(model(X), Y), params) @ V
    one = objective_of(kind, [next(iter(Loader(kind)))], model, keep_graphs=True)
    _ = HessianOperator(one) @ V
    objective = objective_of(
        kind, Loader(kind, shuffle=True), model, memory_budget=int(3 * share * one.held_bytes), keep_graphs="auto"
    )
    for _ in range(3):
        assert_close(HessianOperator(objective) @ V, HV, 1e-10)
    assert objective.shuffles
    assert objective.keeps_all_graphs == (share == 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("change", [{"noise": 1e-3}, {"partners": True}])
def test_other_data_are_refused(kind: str, keep_graphs: bool, change: dict[str, Any]) -> None:
    objective = objective_of(kind, Loader(kind, **change), keep_graphs=keep_graphs)
    objective.loss()
    with pytest.raises(DataError, match=r"other data at each pass .* pass list"):
        objective.gradient()
    fixed = objective_of(kind, list(Loader(kind, **change)), keep_graphs=keep_graphs)
    assert_close(fixed.gradient(), fixed.gradient())


@pytest.mark.parametrize("kind", ["data class", "frozen with slots", "objects in a list", "graphs"])
def test_dropout_needs_a_fixed_order(kind: str) -> None:
    shuffled = objective_of(kind, Loader(kind, shuffle=True), net(nn.Dropout(0.5)), keep_graphs=False)
    shuffled.loss()
    with pytest.raises(DataError, match="the loader shuffles and dropout masks are fixed by batch"):
        shuffled.loss()
    fixed = objective_of(kind, Loader(kind), net(nn.Dropout(0.5)), keep_graphs=False)
    assert fixed.loss() == fixed.loss()


def test_two_examples_swapped_between_batches() -> None:
    class Swapping:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            order = torch.arange(N)
            if self.passes % 2:
                order[[0, N - 1]] = order[[N - 1, 0]]
            self.passes += 1
            for places in order.split(4):
                yield X[places], Y[places]

    model = net()
    H = dense_hessian(lambda: F.cross_entropy(model(X), Y), list(model.parameters()))
    objective = Objective(model, nn.CrossEntropyLoss(), Swapping(), keep_graphs=False)
    for _ in range(2):
        assert_close(HessianOperator(objective).to_dense(), H, 1e-10)
    assert objective.shuffles


def test_opaque_batches() -> None:
    class Opaque:
        def __init__(self, i: int) -> None:
            self.read = lambda: (X[i : i + 4], Y[i : i + 4])

    loader: Any = DataLoader([Opaque(0), Opaque(4)], batch_size=None)  # type: ignore[arg-type]

    def forward(model: nn.Module, batch: Opaque) -> tuple[Tensor, Tensor]:
        x, y = batch.read()
        return model(x), y

    with pytest.raises(DataError, match=r"Opaque hold no tensors, .* pass list"):
        Objective(net(), nn.CrossEntropyLoss(), loader, forward=forward).loss()
    whole = Objective(net(), nn.CrossEntropyLoss(), (X[:8], Y[:8]))
    assert_close(Objective(net(), nn.CrossEntropyLoss(), list(loader), forward=forward).loss(), whole.loss(), 1e-12)


# -- passes that were not completed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(5), nn.Identity()])
@pytest.mark.parametrize("first", ["check", "stopped", "stopped later", "raised"])
def test_an_abandoned_pass_is_no_other_order(layer: nn.Module, first: str) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    objective = Objective(net(layer), nn.CrossEntropyLoss(), loader, keep_graphs=False)
    if first == "check":
        assert objective.check().passed
    elif first == "raised":
        with pytest.raises(ZeroDivisionError):
            objective.reduce(lambda lin: lin.gradient() / (0 // (1 - lin.index)))
    else:
        walk = iter(objective.linearizations())
        for _ in range(1 if first == "stopped" else 3):
            next(walk)
    V = torch.randn(objective.num_params, 2, dtype=torch.float64)
    whole = HessianOperator(objective) @ V
    assert_close(HessianOperator(objective) @ V, whole, 1e-12)
    assert objective.check().passed
    assert not objective.shuffles
    if isinstance(layer, nn.Identity):
        MCFisherOperator(objective, generator=torch.Generator().manual_seed(0))
        NTKOperator(objective)


def test_an_abandoned_pass_tells_of_an_order() -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(), Loader("tuple", shuffle=True))
    for _ in range(2):
        next(iter(objective.batches()))
    assert objective.shuffles


def test_one_shuffled_batch_is_another_order() -> None:
    """The sums are the same, but masks and draws belong to places within the batch."""
    loader = DataLoader(TensorDataset(X, Y), batch_size=N, shuffle=True)
    objective = Objective(net(), nn.CrossEntropyLoss(), loader)
    assert_close(GGNOperator(objective).to_dense(), GGNOperator(objective).to_dense())
    assert objective.shuffles


# -- fingerprints -----------------------------------------------------------------------------------------------------

_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int16,
           torch.uint8, torch.bool]  # fmt: skip


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("width", [3, 20_000])
def test_fingerprints_see_single_entries(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (4, width), generator=generator)
    x[:, 0], x[:, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])  # no two rows alike
    x = x.to(dtype)
    y = torch.arange(4)
    seen = fingerprint((x, y))
    changed = x.clone()
    changed[2, 1] = x[2, 1] == 0
    moved = x.roll(1, 1)
    partners = x[[1, 0, 2, 3]]
    dropped = (torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    others = [fingerprint(batch) for batch in ((changed, y), (moved, y), (partners, y), dropped)]
    assert len({seen, *others}) == 5
    assert all(a != b for other in others for a, b in zip(other.examples, seen.examples, strict=True))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = fingerprint((x[order], y[order]))
    assert shuffled.examples == seen.examples
    assert shuffled.order != seen.order


def test_fingerprints_of_special_entries() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    batches = [x, -x, x.abs(), x.flip(1)]
    with_nan = x.clone()
    with_nan[0, 0] = torch.nan
    batches += [with_nan, with_nan.nan_to_num(1.0)]
    two_signs = x.double()
    two_signs[0, :2] *= -1
    batches += [x.double(), two_signs]
    batches += [torch.zeros(6, dtype=torch.int64), torch.full((6,), -1), torch.full((6,), -100), torch.zeros(5)]
    assert len({fingerprint(batch).examples for batch in batches}) == len(batches)
    assert fingerprint(with_nan) == fingerprint(with_nan.clone())
    assert fingerprint(x) == fingerprint(x.T.contiguous().T) == fingerprint(x.numpy())


def test_fingerprints_pass_over_padding_and_names() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    assert fingerprint(F.pad(ids, (0, 4))).examples == fingerprint(ids).examples
    assert fingerprint(F.pad(ids.float(), (0, 1))).examples == fingerprint(ids.float()).examples
    assert fingerprint((ids, ["a", "b"])) == fingerprint((ids, ["c", "d"]))
    assert fingerprint(["a", "b"]).examples != fingerprint(["a", "c"]).examples
    assert fingerprint((ids, 0.5)).examples != fingerprint((ids, 0.25)).examples
    assert fingerprint((ids, float("nan"))) == fingerprint((ids, float("nan")))
    assert fingerprint({"a": np.array(["x", 1.0], dtype=object)}) != fingerprint(
        {"a": np.array(["x", 2.0], dtype=object)}
    )


def test_fingerprints_of_sparse_batches() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).relu()
    sparse = fingerprint(x.to_sparse())
    assert fingerprint(x[[1, 0, 2, 3, 4]].to_sparse()).examples == sparse.examples
    assert fingerprint(x.roll(1, 1).to_sparse()).examples != sparse.examples
    assert fingerprint(2 * x.to_sparse()).examples != sparse.examples


# -- objects ----------------------------------------------------------------------------------------------------------


def test_objects_are_copied_not_changed() -> None:
    class Node:
        def __init__(self, x: Tensor) -> None:
            self.x, self.name, self.parent = x, "node", self

    for batch in (Record(X, Y), Frozen(Y, X), Node(X), (Node(X), {"y": Record(X, Y)})):
        doubled = map_tensors(batch, lambda t: 2 * t)
        assert [torch.equal(a, 2 * b) for a, b in zip(tensors_in(doubled), tensors_in(batch), strict=True)]
        assert torch.equal(tensors_in(batch)[-1], Y) or torch.equal(tensors_in(batch)[-1], X)
        assert move_batch(batch, X.device) is batch
    whole, pieces = (Objective(net(), nn.CrossEntropyLoss(), [Record(X, Y)], forward=lambda m, b: (m(b.x), b.y),
                               micro_batch=size) for size in (None, 5))  # fmt: skip
    assert_close(HessianOperator(pieces).to_dense(), HessianOperator(whole).to_dense(), 1e-10)
    assert pieces.num_batches == 3


def test_objects_that_move_themselves() -> None:
    class Movable:
        def __init__(self, x: Tensor) -> None:
            self.x, self.device = x, None

        def to(self, device: Any) -> Movable:
            moved = Movable(self.x.to(device))
            moved.device = device
            return moved

    device = torch.device("meta")
    moved = move_batch([Movable(X), Record(X, Y)], device)
    assert moved[0].device == device
    assert all(t.device == device for t in tensors_in(moved))


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ({"input_ids": torch.zeros(16, 128, dtype=torch.long), "labels": torch.zeros(16)}, [(2, 16), (2,)]),
        ({"input_ids": torch.zeros(1, 32, dtype=torch.long)}, [(1, 8)]),
        ((torch.zeros(9, 5), torch.zeros(9, 1)), [(1, 5), (1, 1)]),
        ((torch.zeros(1, 50), torch.zeros(1)), None),
        ({"input_ids": torch.zeros(1, 8, dtype=torch.long)}, None),
        ("no tensors", None),
    ],
)
def test_a_small_part_has_an_eighth_of_examples_and_of_tokens(batch: Any, sizes: list[tuple[int, ...]] | None) -> None:
    part = small_part(batch)
    assert (part if part is None else [tuple(t.shape) for t in tensors_in(part)]) == sizes
