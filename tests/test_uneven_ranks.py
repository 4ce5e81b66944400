"""Ranks with batches of different number, or with none, give what one process with all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import analysis
from curvature import Objective
from curvature.per_example import gradient_moments
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3
    return list(zip(x.split(3), y.split(3), strict=True))


def objective(data: list[Any], group: Any) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return Objective(model, nn.CrossEntropyLoss(), data, process_group=group)


def inspected(o: Objective) -> list[Any]:
    found = analysis.inspect(o, generator=0).inspection
    assert found.diagonal is not None
    return [float(found.loss), found.sharpness.value, *(row.mean for row in found.diagonal.rows)]


def landscape(o: Objective) -> list[Any]:
    found = analysis.look_around(o, points=5, plane=False, generator=torch.Generator().manual_seed(0))
    return [found.num_batches, *(line.losses for line in found.slices), *(line.stderr for line in found.slices)]


CALLS: dict[str, Callable[[Objective], Any]] = {
    "inspect": inspected,
    "moments": lambda o: [getattr(gradient_moments(o), name) for name in ("mean", "second_moment", "layer_traces")],
    "curvature noise": lambda o: analysis.curvature_noise(o, generator=0).noise_scale.value,
    "gradient noise": lambda o: analysis.gradient_noise(o).noise_scale.value,
    "classes": lambda o: analysis.class_structure(o).class_eigenvalues,
    "normalised": lambda o: analysis.measure_sharpness(o, measures=["normalised_average"], generator=0).rows[0].value,
    "landscape": landscape,
}
SHARES = {"3 and 1": slice(0, 3), "all and none": slice(0, None), "none and all": slice(0, 0)}


def answers(data: list[Any], group: Any) -> dict[str, Any]:
    return {name: call(objective(data, group)) for name, call in CALLS.items()}


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        found = {}
        for name, first in SHARES.items():
            data = batches()
            found[name] = answers(data[first] if rank == 0 else data[len(data[first]) :], dist.group.WORLD)
        torch.save(found, f"{folder}/rank{rank}.pt")


@IN_TWO_PROCESSES
def test_ranks_with_other_numbers_of_batches_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    expected = answers(batches(), None)
    for rank in range(2):
        for found in torch.load(tmp_path / f"rank{rank}.pt").values():
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
