"""Runs of two processes that hold parts of a model, or all of it, go on where they were cut off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from curvature import Objective, SpectrumPlan, eigsh, layer_spectra, solve, spectrum
from curvature.errors import InputError, RankError
from curvature.linalg import cg, diagonal, spectral_density, trace
from curvature.linalg.base import checkpoint as checkpoints
from curvature.sharding.tensors import in_parts, whole
from tests.checks import assert_close
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES


class Cut(Exception):
    """What kills a run."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def objective(network: nn.Module, places: list[int], **settings: Any) -> Objective:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    data: Any = [(x[i], torch.arange(2) + i % 2) for i in places]
    return Objective(network, nn.CrossEntropyLoss(), data, **settings)


def sharded(rank: int, **settings: Any) -> Objective:
    from torch.distributed.fsdp import fully_shard

    network: Any = model()
    fully_shard(network[0])
    return objective(fully_shard(network), [0] if rank == 0 else [1, 2, 3], **settings)


def replicas(rank: int) -> Objective:
    return objective(nn.parallel.DistributedDataParallel(model()), [0] if rank == 0 else [1, 2, 3])


PLAN = SpectrumPlan(k=2, num_bottom=1, num_probes=2, num_steps=5)
BLOCK = torch.randn(66, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

CALLS: dict[str, tuple[int, Callable[..., Any]]] = {
    "trace": (9, lambda o, **k: trace(o, num_matvecs=16, generator=0, **k)),
    "signs": (5, lambda o, **k: trace(o, method="hutchinson", num_matvecs=8, generator=0, **k)),
    "streamed": (5, lambda o, **k: diagonal(o, method="hutchinson", num_matvecs=8, generator=0, **k)),
    "density": (13, lambda o, **k: spectral_density(o, num_probes=3, num_steps=6, generator=0, **k)),
    "spectrum": (6, lambda o, **k: spectrum(o, PLAN, generator=0, **k)),
    "layers": (3, lambda o, **k: layer_spectra(o, PLAN, generator=0, **k)),
    "eigenpairs": (
        11,
        lambda o, **k: eigsh(o, 2, method="lanczos", num_basis=8, rtol=1e-8, block_size=1, generator=0, **k),
    ),
    "definite": (8, lambda o, **k: cg(o, in_parts(BLOCK, o.sharding, 0), matrix="ggn", damping=0.1, rtol=1e-5, **k)),
    "indefinite": (6, lambda o, **k: solve(o, o.gradient(), matrix="hessian", damping=1.0, rtol=1e-6, **k)),
}
OF_REPLICAS = ("trace", "definite")


def killing(after: int) -> Callable[..., None]:
    seen = [0]

    def kill(spent: int, text: str = "") -> None:
        seen[0] = spent if text else seen[0] + 1  # `progress` tells the products of each step
        if seen[0] >= after:
            raise Cut

    return kill


def started(name: str, o: Objective, folder: Path) -> None:
    """Begin a run and cut it off."""
    after, call = CALLS[name]
    told: Any = {"progress" if name in ("spectrum", "layers") else "callback": killing(after)}
    with pytest.raises(Cut):
        call(o, checkpoint=folder, **told)


def numbers(result: Any) -> Any:
    """Return what a result holds, as whole tensors and plain values."""
    if isinstance(result, dict):
        return {name: numbers(each) for name, each in result.items()}
    held = {name: getattr(result, name) for name in result.__dataclass_fields__ if name != "seconds"}

    def plain(value: Any) -> Any:
        if hasattr(value, "__dataclass_fields__"):
            return numbers(value)
        return whole(value) if isinstance(value, Tensor) else str(value) if not isinstance(value, float) else value

    return tree_map(plain, held)


def same_bits(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0)) if isinstance(x, Tensor) else x == y or x != x
        for x, y in zip(left, right, strict=True)
    )


REFUSED: dict[str, tuple[Callable[[int, Path], Any], str]] = {
    "whole vectors, now in parts": (
        lambda rank, folder: CALLS["trace"][1](sharded(rank), checkpoint=folder / "alone"),
        "how vectors are held (whole, now in parts)",
    ),
    "other weights": (
        lambda rank, folder: CALLS["trace"][1](_moved(sharded(rank)), checkpoint=folder / "trace"),
        "the parameters of the model",
    ),
    "a folder of one rank's own": (
        lambda rank, folder: CALLS["trace"][1](sharded(rank), checkpoint=folder / f"of-{rank}"),
        "the ranks differ in checkpoint",
    ),
    "other arguments on one rank": (
        lambda rank, folder: trace(sharded(rank), num_matvecs=16, generator=rank, checkpoint=folder / "seeds"),
        "differ in what they gave to trace, generator",
    ),
}


def _moved(o: Objective) -> Objective:
    with torch.no_grad():
        for p in o.model.parameters():
            p.mul_(1 + 1e-7)
    return o


def work(rank: int, folder: str) -> None:
    checkpoints.SHARE = float("inf")
    place, mine = Path(folder), {}
    with process_group(rank, folder):
        for name, (_, call) in CALLS.items():
            for kind, make in {"parts": sharded, "replicas": replicas}.items():
                if kind == "replicas" and name not in OF_REPLICAS:
                    continue
                here = place / (name if kind == "parts" else f"{name}-{kind}")
                started(name, make(rank), here)
                torch.distributed.barrier()
                if rank == 0 and kind == "parts":
                    shutil.copytree(here, place / f"{name}-cut")
                torch.distributed.barrier()
                mine[name, kind] = numbers(call(make(rank))), numbers(call(make(rank), checkpoint=here))
        by_module = sharded(rank, memory_budget=0)
        started("definite", by_module, place / "by-module")
        _, call = CALLS["definite"]
        mine["definite", "by module"] = (
            numbers(call(by_module)),
            numbers(call(by_module, checkpoint=place / "by-module")),
        )
        if rank == 0:
            started("trace", objective(model(), [0, 1, 2, 3]), place / "alone")
        torch.distributed.barrier()
        for name, (refused, _) in REFUSED.items():
            try:
                refused(rank, place)
                mine[name] = "nothing was raised"
            except (InputError, RankError) as error:
                mine[name] = str(error)
        torch.save(mine, place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    in_two_processes(work, str(found))
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CALLS)
def test_two_ranks_end_with_the_same_bits(ranks: list[dict[Any, Any]], name: str) -> None:
    for rank in ranks:
        for kind in ("parts", "replicas", "by module"):
            if (name, kind) in rank:
                alone, resumed = rank[name, kind]
                assert same_bits(alone, resumed), kind
    assert same_bits(ranks[0][name, "parts"][1], ranks[1][name, "parts"][1])


@pytest.mark.parametrize("name", CALLS)
def test_one_process_goes_on_with_what_two_began(folder: Path, ranks: list[dict[Any, Any]], name: str) -> None:
    after, call = CALLS[name]
    o = objective(model(), [0, 1, 2, 3])
    told: list[int] = []
    told_as = "progress" if name in ("spectrum", "layers") else "callback"
    if told_as == "progress":  # one process sees how its batches differ
        with pytest.raises(InputError, match="was made on another number of ranks"):
            call(o, checkpoint=folder / f"{name}-cut")
        return
    found = numbers(call(o, checkpoint=folder / f"{name}-cut", **{told_as: lambda n, *_: told.append(n)}))
    alone = numbers(call(o))
    main = {"density": "density", "eigenpairs": "eigenvalues", "definite": "x", "indefinite": "x"}.get(name, "value")
    for other in (alone, ranks[0][name, "parts"][0]):
        assert_close(found[main], other[main], 1e-9)
    if name in ("definite", "indefinite", "eigenpairs", "streamed"):
        assert told[0] >= after, "it began anew"


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused_on_all_ranks(ranks: list[dict[Any, Any]], name: str) -> None:
    for rank in ranks:
        assert REFUSED[name][1] in rank[name], rank[name]
