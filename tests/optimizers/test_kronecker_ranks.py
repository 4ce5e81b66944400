"""Matrix optimizers on two ranks: the steps of one process, with the work split, for whole and for sharded models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError
from optimizers import SOAP, Shampoo
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SOAP": (SOAP, {"lr": 0.02, "update_every": 2}),
    "Shampoo": (Shampoo, {"lr": 0.02, "update_every": 2, "damping": 1e-3}),
    "SOAP, continuous": (SOAP, {"lr": 0.02, "update_every": 2, "refresh": "continuous"}),
    "SOAP, blocks": (SOAP, {"lr": 0.02, "update_every": 2, "max_dim": 3, "large": "blocks"}),
}
FORMS = ("closure", "ddp", "fsdp", "fsdp closure")
STEPS = 5


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(12, 5, dtype=dtype), torch.randint(0, 3, (12,))


def model_of(dtype: torch.dtype) -> nn.Module:
    """With rows that two ranks cannot share evenly."""
    torch.manual_seed(1)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(15, 3)
    return nn.Sequential(*layers).to(dtype)


def flat(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def run(name: str, form: str, rank: int | None, group: Any, dtype: torch.dtype, resumed: str = "") -> Tensor:
    from torch.distributed.fsdp import fully_shard

    method, settings = METHODS[name]
    model = model_of(dtype)
    x, y = data(dtype)
    rows = slice(12) if rank is None else slice(6 * rank, 6 * rank + 6)

    def made() -> Any:
        more = {} if rank is None or "fsdp" in form else {"process_group": group}
        return method(model.parameters(), **settings, **more)

    if rank is not None and "fsdp" in form:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = made()
    called = DistributedDataParallel(model) if rank is not None and form == "ddp" else model
    for step in range(STEPS):
        if resumed and step == 3:
            optimizer = through_checkpoint(model, optimizer, made(), resumed)
        if "closure" in form:
            optimizer.step(lambda: F.cross_entropy(called(x[rows]), y[rows]))
            continue
        optimizer.zero_grad()
        F.cross_entropy(called(x[rows]), y[rows]).backward()
        optimizer.step()
    if rank is not None:
        held = [n for s in optimizer.state.values() for n, t in s.items() if n.startswith(("basis", "root"))]
        assert 0 < len(held) < len([n for s in whole_state(method, settings, dtype) for n in s])
    return flat(model)


def whole_state(method: Any, settings: dict[str, Any], dtype: torch.dtype) -> list[list[str]]:
    model = model_of(dtype)
    optimizer = method(model.parameters(), **settings)
    optimizer.step(lambda: model(data(dtype)[0]).sum())
    return [[n for n in s if n.startswith(("basis", "root"))] for s in optimizer.state.values()]


def through_checkpoint(model: nn.Module, old: Any, new: Any, folder: str) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dcp.save(get_optimizer_state_dict(model, old), checkpoint_id=folder)
    new.zero_grad()  # a new process has none
    state = get_optimizer_state_dict(model, new)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, new, state)
    return new


def state_of_the_other(rank: int, group: Any) -> str:
    """Return what a step says with a state that another rank saved."""
    model = model_of(torch.float64)
    x, y = data(torch.float64)
    optimizer = SOAP(model.parameters(), process_group=group)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    states: list[Any] = [None, None]
    dist.all_gather_object(states, copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(states[1 - rank])
    try:
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    except InputError as error:
        return str(error)
    return "taken"


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        group = dist.group.WORLD
        results: dict[str, Any] = {
            f"{name}, {form}": run(name, form, rank, group, torch.float64) for name in METHODS for form in FORMS
        }
        for name in METHODS:
            results[f"{name}, float32"] = run(name, "fsdp", rank, group, torch.float32)
            for form in ("ddp", "fsdp"):
                place = f"{folder}/{name}-{form}"
                results[f"{name}, {form}, resumed"] = run(name, form, rank, group, torch.float64, place)
        results["the other's"] = state_of_the_other(rank, group)
        torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_steps_of_one(two_ranks: list[dict[str, Any]], name: str, form: str) -> None:
    a, b = (results[f"{name}, {form}"] for results in two_ranks)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(a, run(name, "closure", None, None, torch.float64), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "SOAP"])
def test_sharded_updates_in_float32(two_ranks: list[dict[str, Any]], name: str) -> None:
    """Rounding differs between ranks and one process; on null vectors, which plain SOAP goes along, it decides."""
    a, b = (results[f"{name}, float32"] for results in two_ranks)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, run(name, "closure", None, None, torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", METHODS)
def test_resumed_through_distributed_checkpoints(two_ranks: list[dict[str, Any]], name: str, form: str) -> None:
    for results in two_ranks:
        assert torch.equal(results[f"{name}, {form}, resumed"], results[f"{name}, {form}"])


def test_the_state_of_another_rank_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    for results in two_ranks:
        assert "Save and load by torch.distributed.checkpoint" in results["the other's"]
