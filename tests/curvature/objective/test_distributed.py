"""Two processes that hold unequal parts of the data compute what one with all of them does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from tests.cases import BY_NAME
from tests.checks import BATCHING_TOLERANCE, assert_close
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

CASES = ("attention by hand", "MLP tanh")  # with padding, so that ranks differ in loss terms too
SIZES = (5, 2)  # examples of the two ranks


def results(name: str, part: slice, group: dist.ProcessGroup | None, reduction: str = "mean") -> dict[str, Tensor]:
    case = BY_NAME[name]
    x, y = case.data()
    loss = type(case.loss)(reduction=reduction)
    data = list(zip(x[part].split(3), y[part].split(3), strict=True))
    objective = Objective(case.model(), loss, data, process_group=group)
    X = torch.randn(objective.num_params, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss_value, gradient = objective.loss_and_gradient()
    block = objective.space.blocks[-1]
    return {
        "loss": loss_value,
        "gradient": gradient,
        "Hessian": HessianOperator(objective) @ X,
        "GGN": GGNOperator(objective) @ X,
        "block": HessianOperator(objective).restrict(block) @ block.take(X),
        "weight": torch.tensor(objective.total_weight if reduction == "mean" else 0.0, dtype=torch.float64),
    }


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        assert dist.group.WORLD is not None
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], sum(SIZES))
        mine = {
            f"{name}, {reduction}": results(name, part, dist.group.WORLD, reduction)
            for name in CASES
            for reduction in ("mean", "sum")
        }
        case, part_wrapped = BY_NAME["MLP tanh"], nn.Sequential(DistributedDataParallel(BY_NAME["MLP tanh"].model()))
        x, y = case.data()
        with pytest.raises(InputError, match="wraps a part of the model"):
            Objective(part_wrapped, case.loss, (x[part], y[part]))
        for wrap in (lambda ddp: ddp, lambda ddp: torch.compile(ddp, backend="eager")):
            wrapped = wrap(DistributedDataParallel(case.model(), static_graph=True))
            found = Objective(wrapped, case.loss, (x[part], y[part])).gradient()
            assert_close(found, Objective(case.model(), case.loss, (x, y)).gradient(), BATCHING_TOLERANCE)
        torch.save(mine, f"{folder}/rank{rank}.pt")


@IN_TWO_PROCESSES
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in CASES:
        for reduction in ("mean", "sum"):
            alone = results(name, slice(None), None, reduction)
            for what, expected in alone.items():
                first, second = (rank[f"{name}, {reduction}"][what] for rank in ranks)
                assert torch.equal(first, second), f"ranks differ in {what}"
                assert_close(first, expected, BATCHING_TOLERANCE)


def test_ranks_do_hold_unequal_weights() -> None:
    """Else a mean of the ranks' means would pass for the mean over all data."""
    case = BY_NAME[CASES[0]]
    x, y = case.data()
    parts = [Objective(case.model(), nn.CrossEntropyLoss(), d) for d in ((x[:5], y[:5]), (x[5:], y[5:]))]
    weights = [part.total_weight for part in parts]
    assert weights[0] != weights[1]
    assert abs(float(parts[0].loss() - parts[1].loss())) > 1e-3
