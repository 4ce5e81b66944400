"""What the whole sharpness table of digits-cnn and a landscape of 51 x 51 points cost, on one thread.

    python -m benchmarks.sharpness.bench [--points P] [--out FILE]      rows to results/sharpness.json

Seconds are those of the process's CPU time and of the wall clock, with the load of the machine beside them, and the
time of one plain forward pass taken before and after: what slows the machine down slows both.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch

from analysis.landscape.directions import random_direction
from analysis.landscape.measure import loss_on_plane
from analysis.sharpness.measure import measure_sharpness
from analysis.tasks import load_task
from benchmarks.common.suite import RESULTS as RESULTS_FOLDER
from benchmarks.common.suite import Row, Rows, command
from curvature import Objective

__all__ = ["main"]

RESULTS = RESULTS_FOLDER / "sharpness.json"


class _Clock:
    """CPU and wall-clock seconds since it was made, with the time of a forward pass at both ends."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.forwards = objective, _forward(objective)
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> Row:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        forward = statistics.median(self.forwards + _forward(self.objective))
        return {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "forward_seconds": forward,
            "forwards": cpu / forward,
            "load": os.getloadavg()[0],
        }


@torch.no_grad()
def _forward(objective: Objective, rounds: int = 7) -> list[float]:
    (batch,) = objective.batches()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        objective.model(batch[0])
        times.append(time.process_time() - start)
    return times


def _table(task: Any) -> list[Row]:
    objective = task.objective()
    clock = _Clock(objective)
    table = measure_sharpness(objective, generator=torch.Generator().manual_seed(0))
    rows = [{"what": "sharpness table", "count": len(table.rows), **clock.read()}]
    for row in table.rows:
        price = {"losses": row.num_losses, "gradients": row.num_gradients, "products": row.num_matvecs}
        found = {"value": row.value, "stderr": row.stderr if row.stderr == row.stderr else None}
        rows.append({"what": row.name, "wall_seconds": row.seconds, **price, **found})
    return rows


def _landscape(task: Any, points: int) -> list[Row]:
    objective, generator = task.objective(), torch.Generator().manual_seed(0)
    first, second = (random_direction(objective, generator=generator) for _ in range(2))
    axis = torch.linspace(-1, 1, points)
    clock = _Clock(objective)
    loss_on_plane(objective, first, second, axis, axis)
    return [{"what": "landscape", "count": points**2, **clock.read()}]


def main() -> None:
    """Measure both and write the rows."""
    parser = command("sharpness", __doc__)
    parser.add_argument("--points", type=int, default=51, help="along each side of the landscape")
    a = parser.parse_args()
    task = load_task("digits-cnn")
    with Rows(a.out, ("what",), 2) as rows:
        for found in (_table(task), _landscape(task, a.points)):
            first = found[0]
            rows.add(
                *({"task": "digits-cnn", "threads": 1, **row} for row in found),
                said=f"{first['what']}: {first['cpu_seconds']:.1f} s of CPU time, {first['wall_seconds']:.1f} s by the "
                f"clock, {first['forwards']:.0f} forward passes' worth, load {first['load']:.1f}",
            )


if __name__ == "__main__":
    main()
