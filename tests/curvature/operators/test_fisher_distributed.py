"""Fisher matrices and covariances of two processes that hold unequal parts of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GradientCovarianceOperator,
    JacobianOperator,
    MCFisherOperator,
    Objective,
)
from curvature.errors import InputError
from tests.cases import BY_NAME
from tests.checks import BATCHING_TOLERANCE, assert_close
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

NAME = "attention by hand"  # with padding, so that ranks differ in loss terms too
SIZES = (5, 2)  # examples of the two ranks
REDUCTIONS = ("mean", "sum")


def objective(part: slice, group: dist.ProcessGroup | None, reduction: str) -> Objective:
    case = BY_NAME[NAME]
    x, y = case.data()
    data = list(zip(x[part].split(3), y[part].split(3), strict=True))
    return Objective(case.model(), type(case.loss)(reduction=reduction), data, process_group=group)


def results(part: slice, group: dist.ProcessGroup | None, reduction: str) -> dict[str, Tensor]:
    o = objective(part, group, reduction)
    X = torch.randn(o.num_params, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "Fisher": FisherOperator(o) @ X,
        "sequences": EmpiricalFisherOperator(o) @ X,
        "targets": EmpiricalFisherOperator(o, per="target") @ X,
        "covariance": GradientCovarianceOperator(o) @ X,
        "unbiased": GradientCovarianceOperator(o, per="target", unbiased=True) @ X,
    }


def drawn(part: slice, group: dist.ProcessGroup | None, num_samples: int) -> Tensor:
    o = objective(part, group, "mean")
    A = MCFisherOperator(o, num_samples=num_samples, generator=torch.Generator().manual_seed(5))
    return A @ torch.ones(o.num_params, dtype=torch.float64)


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        group = dist.group.WORLD
        assert group is not None
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], sum(SIZES))
        mine: dict[str, object] = {reduction: results(part, group, reduction) for reduction in REDUCTIONS}
        mine["many draws"] = drawn(part, group, 20_000)
        mine["same data, one draw"] = drawn(slice(0, 2), group, 1)
        with pytest.raises(InputError, match="ranks of a process_group hold different ones"):
            JacobianOperator(objective(part, group, "mean"))
        torch.save(mine, f"{folder}/rank{rank}.pt")


@IN_TWO_PROCESSES
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for reduction in REDUCTIONS:
        for what, expected in results(slice(None), None, reduction).items():
            assert torch.equal(first[reduction][what], second[reduction][what]), f"ranks differ in {what}"
            assert_close(first[reduction][what], expected, BATCHING_TOLERANCE)
    exact = objective(slice(None), None, "mean")
    v = torch.ones(exact.num_params, dtype=torch.float64)
    assert torch.equal(first["many draws"], second["many draws"])
    assert_close(first["many draws"], FisherOperator(exact) @ v, 0.03)  # draws: relative errors of 20,000^-1/2
    alone = drawn(slice(0, 2), None, 1)  # what two ranks with alike draws would find
    assert float((first["same data, one draw"] - alone).norm()) > 1e-3 * float(alone.norm())
