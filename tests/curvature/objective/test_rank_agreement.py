"""Two processes: what differs between ranks or fails on one raises on both; a rank without data counts nothing."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from analysis import random_direction
from curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    MCFisherOperator,
    Objective,
    SpectrumPlan,
    eigsh,
    solve,
    spectrum,
)
from curvature.fingerprints.portable import argument, content
from curvature.linalg import ThickRestartLanczos, diagonal, lanczos, trace
from curvature.objective.shift import loss_at
from tests.ranks import in_processes_of_their_own


def net(hidden: int = 5) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 3)).double().eval()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def objective(rank: int, group: Any = None, *, model: nn.Module | None = None, **more: Any) -> Objective:
    x, y = data()
    part = slice(8) if rank == 0 else slice(8, 12)
    given = more.pop("data", [(x[part], y[part])])
    return Objective(model or net(), more.pop("loss", nn.CrossEntropyLoss()), given, process_group=group, **more)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _changed(rank: int, group: Any, change: Callable[[Any], object]) -> Tensor:
    model = net()
    o = objective(rank, group, model=model)
    if rank == 1:
        change(model)
    return o.loss()


def _swap(model: Any) -> None:
    with torch.no_grad():
        model[3].weight.copy_(model[3].weight[[1, 0, 2]])


def _late(rank: int, group: Any) -> None:
    """Rank 1 fails in the middle of a product, rank 0 is in the same one."""
    model = net()
    o = objective(rank, group, model=model)
    A = HessianOperator(o)
    A @ torch.ones(A.shape[0], dtype=torch.float64)
    if rank == 1:
        model[1].register_forward_hook(lambda *_: 1 / 0)
        o.release()
        with torch.no_grad():
            model[0].bias.add_(0)
    A @ torch.ones(A.shape[0], dtype=torch.float64)


def _class_weights(rank: int, group: Any) -> Tensor:
    weights = torch.ones(3, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    o = objective(rank, group, loss=loss)
    weights[rank] += 1
    return o.loss()


def sharded(rank: int, memory_budget: int | None) -> Objective:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    batch = (data()[0][rank::2], data()[1][rank::2] % 2)
    return Objective(model, nn.CrossEntropyLoss(), batch, memory_budget=memory_budget)


def _used(generator: torch.Generator, count: int) -> torch.Generator:
    torch.randn(count, generator=generator)
    return generator


x, y = data()
REFUSED: dict[str, tuple[str, Callable[[int, Any], Any]]] = {
    "weights": ("'0.weight'", lambda r, g: _changed(r, g, lambda m: m[0].weight.data.mul_(3))),
    "signs of two entries": ("'0.bias'", lambda r, g: _changed(r, g, lambda m: m[0].bias.data[:2].neg_())),
    "hidden units swapped": ("'3.weight'", lambda r, g: _changed(r, g, _swap)),
    "buffers": ("buffer '2.running_mean'", lambda r, g: _changed(r, g, lambda m: m[2].running_mean.add_(1))),
    "modes": ("modes", lambda r, g: _changed(r, g, lambda m: m.train())),
    "class weights": ("settings of the loss", _class_weights),
    "label smoothing": (
        "settings of the loss",
        lambda r, g: objective(r, g, loss=nn.CrossEntropyLoss(label_smoothing=0.1 * r)).loss(),
    ),
    "partial": (
        "settings of the loss",
        lambda r, g: objective(
            r, g, loss=functools.partial(nn.functional.cross_entropy, label_smoothing=0.1 * r)
        ).loss(),
    ),
    "architecture": ("gave to Objective", lambda r, g: objective(r, g, model=net(5 + r))),
    "selection": ("gave to Objective", lambda r, g: objective(r, g, params=("0.*", "3.*")[r])),
    "loss": ("gave to Objective", lambda r, g: objective(r, g, loss=(nn.CrossEntropyLoss(), nn.NLLLoss())[r])),
    "seed": ("gave to Objective", lambda r, g: objective(r, g, seed=r)),
    "selects nothing": ("no parameter", lambda r, g: objective(r, g, params=("*", "nothing")[r])),
    "generators": (
        "gave to diagonal, generator: rank 0 against rank 1",
        lambda r, g: diagonal(HessianOperator(objective(r, g)), num_matvecs=4, generator=generator(r)),
    ),
    "start": (
        "gave to eigsh, v0: rank 0",
        lambda r, g: eigsh(objective(r, g), 1, v0=torch.ones(53, dtype=torch.float64) + r, generator=0),
    ),
    "vectors": (
        "different vectors",
        lambda r, g: HessianOperator(objective(r, g)) @ torch.full((53,), 1.0 + r, dtype=torch.float64),
    ),
    "drawn targets": (
        "gave to MCFisherOperator, generator",
        lambda r, g: MCFisherOperator(objective(r, g), generator=generator(r)),
    ),
    "k": ("gave to eigsh, k", lambda r, g: eigsh(objective(r, g), 1 + r, generator=generator())),
    "several": (
        "gave to ThickRestartLanczos, k, rtol, generator",
        lambda r, g: ThickRestartLanczos(objective(r, g), 1 + r, rtol=(0.1, 0.2)[r], generator=r),
    ),
    "a sum of matrices": (
        "gave to trace, generator",
        lambda r, g: trace(HessianOperator(objective(r, g)) + GGNOperator(objective(r, g)), generator=r),
    ),
    "plans": (
        "gave to spectrum, plan",
        lambda r, g: spectrum(objective(r, g), SpectrumPlan(k=1, num_probes=2 + r), generator=0),
    ),
    "tolerances": (
        "gave to solve, rtol",
        lambda r, g: solve(objective(r, g), torch.ones(53).double(), matrix="ggn", damping=1, rtol=(0.1, 0.2)[r]),
    ),
    "a callback": (
        "by zero",
        lambda r, g: trace(objective(r, g), num_matvecs=4, generator=0, callback=lambda *_: 1 // (1 - r)),
    ),
    "refused on one": (
        "callback must be callable",
        lambda r, g: trace(objective(r, g), num_matvecs=4, generator=0, callback=(print, object())[r]),
    ),
    "directions": ("gave to random_direction", lambda r, g: random_direction(objective(r, g), generator=r)),
    **{
        f"{what}, {route}": (words, functools.partial(call, budget))
        for route, budget in {"whole parameters": None, "module by module": 0}.items()
        for what, (words, call) in {
            "seeds": ("gave to trace, generator", lambda b, r, _: trace(sharded(r, b), num_matvecs=4, generator=r)),
            "kept generators": (
                "gave to eigsh, generator",
                lambda b, r, _: eigsh(sharded(r, b), 1, generator=_used(generator(), r)),
            ),
            "starts": (
                "gave to lanczos, v0",
                lambda b, r, _: lanczos(sharded(r, b), torch.full((23,), 1.0 + r).double(), num_steps=2),
            ),
            "multiplied": (
                "different vectors",
                lambda b, r, _: HessianOperator(sharded(r, b)) @ torch.full((23,), 1.0 + r).double(),
            ),
        }.items()
    },
    "calls": ("shapes", lambda r, g: objective(r, g).loss() if r else objective(r, g).gradient()),
    "matrices": (
        "different calls",
        lambda r, g: (HessianOperator, GGNOperator)[r](objective(r, g)) @ torch.ones(53, dtype=torch.float64),
    ),
    "columns": (
        "different calls",
        lambda r, g: HessianOperator(objective(r, g)) @ torch.ones(53, 1 + r, dtype=torch.float64),
    ),
    "NaN": ("the loss is nan", lambda r, g: objective(r, g, data=[(x / (1 - r), y)]).loss()),
    "no second": ("gave to", lambda r, g: objective(r, g, weight=(None, lambda _: 1.0)[r])),
    "exception": ("by zero", _late),
    "empty everywhere": ("no batch on any rank", lambda r, g: objective(r, g, data=[]).loss()),
    "check": ("by zero", lambda r, g: objective(r, g, loss=None, forward=_fails(r)).check()),
    "loss at a point": ("by zero", lambda r, g: loss_at(_failing(r, g), _failing(r, g).space.current())),
}


def _fails(rank: int) -> Callable[..., Tensor]:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean() * (1 // (1 - rank))

    return forward


def _failing(rank: int, group: Any) -> Objective:
    return objective(rank, group, loss=None, forward=_fails(rank))


def no_data(rank: int, group: Any, empty: Any) -> dict[str, Tensor]:
    """All data on rank 0, an empty list or loader or batch on rank 1."""
    o = objective(rank, group, data=[data()] if rank == 0 else empty)
    v = torch.ones(o.num_params, dtype=torch.float64)
    return {
        "loss": o.loss(),
        "gradient": o.gradient(),
        "H": HessianOperator(o) @ v,
        "F": EmpiricalFisherOperator(o) @ v,
        "top": eigsh(o, 2, generator=generator()).eigenvalues,
        "check": torch.tensor(float(o.check().passed)),
    }


def empties() -> dict[str, Any]:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:0], y[:0]), batch_size=4)
    return {"list": [], "loader": loader, "batch": [(x[:0], y[:0])], "ignored": [(x[:2], torch.full((2,), -100))]}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD
    errors = {}
    for name, (_, call) in REFUSED.items():
        start = time.monotonic()
        try:
            call(rank, group)
            errors[name] = ("none", "", 0.0)
        except Exception as error:
            errors[name] = (type(error).__name__, str(error), time.monotonic() - start)
    o = objective(rank, group)
    told: list[int] = []
    one = None if rank else lambda done, _: told.append(done)  # prints on one
    results: dict[str, Any] = {"errors": errors, "alike": o.loss(), "told": told}
    trace(o, num_matvecs=4, generator=0 if rank else generator(), callback=one)
    results |= {name: no_data(rank, group, empty) for name, empty in empties().items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    if rank == 1:
        os._exit(0)  # dies
    try:
        objective(rank, group)
    except Exception as error:
        results["left alone"] = (type(error).__name__, str(error))
    torch.save(results, f"{folder}/rank{rank}.pt")


pytestmark = pytest.mark.xdist_group("ranks that agree")  # one pair of processes for all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("agreement")
    in_processes_of_their_own(work, str(folder), 2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_raise_at_once(ranks: list[dict[str, Any]], name: str) -> None:
    kinds = {results["errors"][name][0] for results in ranks}
    assert "none" not in kinds
    assert "RankError" in kinds or kinds == {"DataError"}
    for results in ranks:
        _, text, seconds = results["errors"][name]
        assert REFUSED[name][0] in text
        assert seconds < 30


@pytest.mark.parametrize("name", ["list", "loader", "batch", "ignored"])
def test_a_rank_without_data_counts_nothing(ranks: list[dict[str, Any]], name: str) -> None:
    alone = no_data(0, None, None)
    for results in ranks:
        for what, expected in alone.items():
            torch.testing.assert_close(results[name][what], expected, rtol=1e-6, atol=1e-9, msg=what)


def test_ranks_that_agree_work_after_all_that_and_a_dead_one_is_named(ranks: list[dict[str, Any]]) -> None:
    expected = Objective(net(), nn.CrossEntropyLoss(), data()).loss()
    for results in ranks:
        torch.testing.assert_close(results["alike"], expected)
    assert ranks[0]["told"]
    kind, text = ranks[0]["left alone"]
    assert kind == "RankError"
    assert "another rank of the process group ended" in text


def test_content_sees_what_sums_miss() -> None:
    torch.manual_seed(0)
    t = torch.randn(3, 5000)
    rows, columns = t[[1, 0, 2]], t.clone()
    columns[:, [0, 1]] = columns[:, [1, 0]]
    flipped, moved = t.clone(), t.clone()
    flipped[0, :2].neg_()
    moved[0, 0], moved[0, 4096] = t[0, 4096], t[0, 0]
    digests = {content([v]) for v in (t, rows, columns, flipped, moved, t.double(), t.bfloat16())}
    assert len(digests) == 7
    assert content([t]) == content([t.clone()])
    assert content([torch.tensor(1.0), torch.empty(0, 3), torch.tensor([True])]) > 0
    assert content([torch.eye(3).to_sparse()]) == content([torch.eye(3)])


def test_the_same_argument_has_the_same_digest_in_every_process() -> None:
    alike = [
        ("generator", 3, generator(3)),
        ("v0", torch.ones(3), torch.ones(3)),
        ("basis_device", "cuda:0", "cuda:1"),
        ("basis_device", "cpu", torch.device("cpu")),
        ("k", 3, np.int64(3)),
        ("k", 3, torch.tensor(3)),
        ("step", 0.1, np.float64(0.1)),
        ("step", 2, 2.0),
        ("times", range(3), (0, 1, 2)),
        ("names", {"a", "b"}, frozenset(["b", "a"])),
        ("plan", SpectrumPlan(k=2), SpectrumPlan(k=2)),
        ("times", np.arange(3), [0, 1, 2]),
        ("held_out", [(torch.ones(2), torch.ones(2))], [(torch.zeros(2), torch.ones(2))]),
    ]
    for name, a, b in alike:
        assert argument(name, a) == argument(name, b) is not None, name
    values = (True, 1.5, "LA", [1, None], {"a": 1}, {"a": 2}, SpectrumPlan(k=2), SpectrumPlan(k=3))
    kinds = (torch.float64, torch.ones(2), torch.ones(1, 2), generator(1), _used(generator(1), 1))
    assert len({argument("", v) for v in (*values, *kinds)}) == len(values) + len(kinds)
    assert argument("callback", print) is argument("callback", None) is argument("model", nn.Linear(1, 1)) is None
