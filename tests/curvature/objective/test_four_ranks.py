"""Four processes: meshes of two dimensions, ranks without data or parameters, and one that dies."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, Objective, eigsh
from curvature.linalg import trace
from curvature.sharding.tensors import in_parts, whole
from tests.checks import assert_close
from tests.ranks import in_processes_of_their_own

RANKS, TIMEOUT = 4, 20  # s


class Net(nn.Module):
    """Widths that four ranks do not divide: of five rows they hold two, two, one and none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def net() -> Any:
    torch.manual_seed(0)
    return Net().double()


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(zip(x.split(3), (torch.arange(9) % 3).split(3), strict=True))


def objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    return Objective(model, nn.CrossEntropyLoss(), data, **settings)


def values(o: Objective) -> dict[str, Tensor]:
    X = torch.randn(o.num_params, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = in_parts(X, o.sharding, 0)
    H = HessianOperator(o)
    bias = o.space.block("stem.bias")  # the last rank has nothing of it
    found = {
        **{"gradient": o.gradient(), "Hessian": H @ S, "Gauss-Newton": GGNOperator(o) @ S},
        "bias": H.restrict(bias) @ bias.take(S),
    }
    return {name: whole(value) for name, value in found.items()}


def solved(o: Objective) -> dict[str, Tensor]:
    top = eigsh(o, 2, rtol=1e-8, confidence=None, generator=0).eigenvalues
    return {"top": top, "trace": trace(HessianOperator(o), num_matvecs=6, generator=1).value}


def fully_sharded(rank: int, **settings: Any) -> Objective:
    """A rank has most of the data, one has none."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.up)
    data = [batches()[:1], [], batches()[1:2], batches()[2:]][rank]
    return objective(fully_shard(model), data, **settings)


def on_a_mesh(**settings: Any) -> Objective:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = parallelize_module(net(), mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = batches()[:1] if mesh.get_local_rank("data") == 0 else batches()[1:]
    return objective(fully_shard(model, mesh=mesh["data"]), data, **settings)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT)
    )
    found: dict[str, Any] = {}
    for name, settings in {"whole": {}, "by module": {"memory_budget": 0}}.items():
        sharded = fully_sharded(rank, **settings)
        found[f"fully sharded, {name}"] = values(sharded)
    found["mesh"] = values(on_a_mesh())
    found["mesh, by module"] = values(on_a_mesh(memory_budget=0))
    found["fully sharded, whole"] |= solved(fully_sharded(rank))

    def dying(model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        if rank == 3:  # in the middle of the walk
            torch.save(found, f"{folder}/rank{rank}.pt")
            os._exit(0)
        return outputs, batch[1]

    start = time.monotonic()
    try:
        o = fully_sharded(rank, memory_budget=0, forward=dying)
        HessianOperator(o) @ torch.ones(o.num_params, dtype=torch.float64)
        found["dead"] = ("none", "", 0.0)
    except Exception as error:
        found["dead"] = (type(error).__name__, str(error), time.monotonic() - start)
    torch.save(found, f"{folder}/rank{rank}.pt")
    os._exit(0)  # a group with a dead rank is not to be left in order


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    in_processes_of_their_own(work, str(folder), RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


pytestmark = pytest.mark.xdist_group("four ranks")


@pytest.mark.parametrize("case", ["fully sharded, whole", "fully sharded, by module", "mesh", "mesh, by module"])
def test_four_ranks_equal_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    o = objective(net(), batches())
    alone = {**values(o), **solved(o)}
    for rank in ranks:
        assert len(rank[case]) >= 4
        for what, value in rank[case].items():
            assert_close(value, alone[what], 1e-10)


def test_a_rank_that_dies_in_a_walk_is_an_error_on_all_others(ranks: list[dict[str, Any]]) -> None:
    assert "dead" not in ranks[3]
    for rank in ranks[:3]:
        kind, text, seconds = rank["dead"]
        assert kind == "RankError", text
        assert "another rank of the process group ended" in text
        assert seconds < TIMEOUT + 10
