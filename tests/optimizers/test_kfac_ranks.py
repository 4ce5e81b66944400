"""K-FAC and Gauss-Newton on two ranks with unequal parts of a batch: the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError
from optimizers import EKFAC, KFAC, GaussNewton
from tests.ranks import IN_TWO_PROCESSES, in_two_processes

pytestmark = IN_TWO_PROCESSES
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC": (KFAC, {"lr": 0.02, "fisher": "empirical", "refresh_every": 2}),
    "KFAC, clipped": (KFAC, {"lr": 0.5, "fisher": "type-2", "graft": None, "kl_clip": 1e-3, "update_every": 2}),
    "EKFAC": (EKFAC, {"lr": 0.02, "fisher": "type-2", "refresh_every": 2}),
}


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


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        group = dist.group.WORLD
        found = {f"{name}, closure": run(name, "closure", rank, group) for name in METHODS}
        found["gauss-newton"] = gauss_newton(rank, group)
        found["ddp"] = run("KFAC", "ddp", rank, group)
        found["resumed"] = run("EKFAC", "closure", rank, group, f"{folder}/saved")
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


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


def work_in_parts(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/parts", rank=rank, world_size=2)
    try:
        model = model_of()
        fully_shard(model)
        with pytest.raises(InputError, match="take SOAP or Shampoo"):
            KFAC(model.parameters(), loss=F.cross_entropy)
    finally:
        dist.destroy_process_group()


def test_models_in_parts_are_refused(tmp_path: Path) -> None:
    in_two_processes(work_in_parts, str(tmp_path))
