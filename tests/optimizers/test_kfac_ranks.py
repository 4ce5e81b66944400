"""K-FAC and Gauss-Newton on two ranks with unequal parts of a batch: the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError, RankError
from optimizers import EKFAC, KFAC, GaussNewton, Sharded
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC": (KFAC, {"lr": 0.02, "fisher": "empirical", "refresh_every": 2}),
    "KFAC, clipped": (KFAC, {"lr": 0.5, "fisher": "type-2", "graft": None, "kl_clip": 1e-3, "update_every": 2}),
    "EKFAC": (EKFAC, {"lr": 0.02, "fisher": "type-2", "refresh_every": 2}),
}
IN_PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **METHODS,
    "EKFAC, float64 factors": (EKFAC, {**METHODS["EKFAC"][1], "factor_dtype": "float64"}),
    "GaussNewton": (GaussNewton, {"iterations": 300, "rtol": 1e-13}),
}
CHANGED = ("KFAC", "EKFAC", "GaussNewton")


def model_of() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Unflatten(1, (1, 7)),
        nn.Conv1d(1, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(15, 3),
    )
    return nn.Sequential(*layers).double()


def run(name: str, form: str, rank: int | None, group: Any, resumed: str = "") -> Tensor:
    method, settings = METHODS[name]
    torch.manual_seed(3)
    x, y = torch.randn(48, 5).double(), torch.randint(0, 3, (48,))  # factors of full rank have one basis
    half = 24 if form == "ddp" else 30  # which counts ranks alike
    rows = slice(48) if rank is None else (slice(half) if rank == 0 else slice(half, 48))
    model = model_of()
    more = {} if rank is None else {"process_group": group}

    def made() -> Any:
        return method(model.parameters(), loss=F.cross_entropy, **settings, **more)

    optimizer = made()
    called = DistributedDataParallel(model) if form == "ddp" else model
    for step in range(5):
        if resumed and step == 3:
            from tests.optimizers.test_kronecker_ranks import through_checkpoint

            new, before = made(), [p.detach().clone() for p in model.parameters()]
            new.step(lambda: (called(x[:2]), y[:2]))  # its state then has the tensors to load into
            for p, q in zip(model.parameters(), before, strict=True):
                p.data.copy_(q)
            optimizer = through_checkpoint(model, optimizer, new, resumed)
        optimizer.step(lambda: (called(x[rows]), y[rows]))
    if rank is not None:
        held = [s for s in optimizer.state.values() if "left" in s]
        assert len(held) == 3 if method is EKFAC else 0 < len(held) < 3
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gauss_newton(rank: int | None, group: Any) -> Tensor:
    """Systems that are solved do not depend on the ranks' own draws for the preconditioner."""
    torch.manual_seed(3)
    x, y = torch.randn(48, 5).double(), torch.randint(0, 3, (48,))
    rows = slice(48) if rank is None else (slice(30) if rank == 0 else slice(30, 48))
    model, more = model_of(), {} if rank is None else {"process_group": group}
    optimizer = GaussNewton(model.parameters(), loss=F.cross_entropy, iterations=300, rtol=1e-13, **more)
    for _ in range(3):
        optimizer.step(lambda: (model(x[rows]), y[rows]))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def in_parts(name: str, rank: int | None, dtype: torch.dtype) -> Tensor:
    """Five steps under fully_shard, by `Sharded`, the third with a new optimizer and the first rank's state."""
    from torch.distributed.fsdp import fully_shard

    method, settings = IN_PARTS[name]
    torch.manual_seed(3)
    x, y = torch.randn(48, 5).to(dtype), torch.randint(0, 3, (48,))
    rows = slice(48) if rank is None else (slice(30) if rank == 0 else slice(30, 48))
    model: Any = model_of().to(dtype)
    if rank is not None:
        fully_shard(model[0])
        fully_shard(model)
        with pytest.raises(InputError, match=rf"optimizers\.Sharded\(model, {method.__name__}"):
            method(model.parameters(), loss=F.cross_entropy)

    def made() -> Any:
        if rank is None:
            return method(model.parameters(), loss=F.cross_entropy, **settings)
        return Sharded(model, method, loss=F.cross_entropy, **settings)

    optimizer = made()
    for step in range(5):
        if step == 3 and rank is not None:
            states = [optimizer.state_dict()]
            dist.broadcast_object_list(states, src=0)
            optimizer = made()
            optimizer.load_state_dict(states[0])
        optimizer.step(lambda: (model(x[rows]), y[rows]))
    if rank is not None:
        replaced, model[6] = model[6], nn.Linear(15, 3).to(dtype)
        with pytest.raises(InputError, match="build the optimizer anew"):
            optimizer.step(lambda: (model(x[rows]), y[rows]))
        model[6] = replaced
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def changed(name: str, what: str, rank: int | None) -> Tensor:
    """Three steps in parts: cast to float32 by FSDP2, or a weight frozen after the first and a bias only before it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    method, settings = IN_PARTS[name]
    torch.manual_seed(3)
    x, y = torch.randn(48, 5).double(), torch.randint(0, 3, (48,))
    rows = slice(48) if rank is None else (slice(30) if rank == 0 else slice(30, 48))
    model: Any = model_of()
    model[6].bias.requires_grad_(what != "frozen")
    if rank is not None:
        policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32)} if what == "cast" else {}
        fully_shard(model, **policy)
    made = method if rank is None else Sharded
    optimizer = made(
        model.parameters() if rank is None else model,
        *() if rank is None else (method,),
        loss=F.cross_entropy,
        **settings,
    )
    for step in range(3):
        if what == "frozen" and step == 1:
            model[0].weight.requires_grad_(False)
            model[6].bias.requires_grad_(True)
        optimizer.step(lambda: (model(x[rows]).double(), y[rows]))
    states = (optimizer if rank is None else optimizer.inner).state.values()
    assert what == "frozen" or sum("left" in state for state in states) == 3
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def failing(rank: int, group: Any) -> str:
    """Return what KFAC's step says where the closure of rank 1 fails."""

    def closure() -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise OSError("on purpose")
        return model(torch.ones(4, 5).double()), torch.zeros(4).long()

    model = model_of()
    try:
        KFAC(model.parameters(), loss=F.cross_entropy, process_group=group).step(closure)
    except (RankError, OSError) as error:
        return str(error)
    return "taken"


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        group = dist.group.WORLD
        found = {f"{name}, closure": run(name, "closure", rank, group) for name in METHODS}
        found["gauss-newton"] = gauss_newton(rank, group)
        for dtype in (torch.float64, torch.float32):
            named = str(dtype).removeprefix("torch.")
            found |= {f"{name}, in parts, {named}": in_parts(name, rank, dtype) for name in IN_PARTS}
        found |= {f"{n}, {what}": changed(n, what, rank) for n in CHANGED for what in ("cast", "frozen")}
        found["failing"] = failing(rank, group)
        found["ddp"] = run("KFAC", "ddp", rank, group)
        found["resumed"] = run("EKFAC", "closure", rank, group, f"{folder}/saved")
        torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_steps_of_one(two_ranks: list[dict[str, Tensor]], name: str) -> None:
    a, b = (found[f"{name}, closure"] for found in two_ranks)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, run(name, "closure", None, None), rtol=1e-9, atol=1e-11)


def test_gauss_newton_on_two_ranks_takes_the_steps_of_one(two_ranks: list[dict[str, Tensor]]) -> None:
    a, b = (found["gauss-newton"] for found in two_ranks)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, gauss_newton(None, None), rtol=1e-8, atol=1e-9)


def test_closures_may_call_data_parallel_wrappers(two_ranks: list[dict[str, Tensor]]) -> None:
    for found in two_ranks:
        torch.testing.assert_close(found["ddp"], run("KFAC", "closure", None, None), rtol=1e-9, atol=1e-11)


def test_resumes_through_a_distributed_checkpoint(two_ranks: list[dict[str, Tensor]]) -> None:
    for found in two_ranks:
        assert torch.equal(found["resumed"], found["EKFAC, closure"])


@pytest.mark.parametrize("what", ["cast", "frozen"])
@pytest.mark.parametrize("name", CHANGED)
def test_models_in_parts_may_be_cast_and_frozen(two_ranks: list[dict[str, Tensor]], name: str, what: str) -> None:
    """Casts of FSDP2 keep their factors, and `requires_grad` counts as it is at the step."""
    a, b = (found[f"{name}, {what}"] for found in two_ranks)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, changed(name, what, None), rtol=0, atol=1e-10 if what == "frozen" else 1e-4)


def test_a_closure_that_fails_on_one_rank_raises_on_both(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[1]["failing"] == "on purpose"
    assert "rank 1: OSError: on purpose" in two_ranks[0]["failing"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", IN_PARTS)
def test_models_in_parts_take_the_steps_of_one_process(
    two_ranks: list[dict[str, Tensor]], name: str, dtype: str
) -> None:
    a, b = (found[f"{name}, in parts, {dtype}"] for found in two_ranks)
    assert torch.equal(a, b)
    atol = 1e-11 if dtype == "float64" else 1e-5 if name == "EKFAC" else 1e-6  # close eigenvectors turn by more
    torch.testing.assert_close(a, in_parts(name, None, getattr(torch, dtype)), rtol=0, atol=atol)
