"""What commands cost on digits-cnn, on 1 and 2 cores: the table of sharpness, a plane of 51 x 51 points, an inspection.

    python -m benchmarks.sharpness.bench [--points P] [--what table landscape inspect] [--threads T ...] [--out FILE]

Seconds are those of CPU time, of processes that share the work too, and of the wall clock, with the load of the machine
beside them, and the time of one plain forward pass on one thread before and after: what slows the machine down slows
both. The landscape is also measured in the 16 groups that the command cuts the data into, for errors over the data. Of
the inspection the process is measured from its start to its end, beside one that imports torch and does nothing.
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analysis.landscape.directions import random_direction
from analysis.landscape.measure import loss_on_plane
from analysis.registry import load_run
from analysis.run.cores import one_thread
from analysis.run.preparation import in_groups
from analysis.sharpness.measure import measure_sharpness
from analysis.tasks import load_task
from benchmarks.common.suite import RESULTS as RESULTS_FOLDER
from benchmarks.common.suite import ROOT, Row, Rows, command
from curvature import Objective

__all__ = ["COMMANDS", "main"]

RESULTS = RESULTS_FOLDER / "sharpness.json"
COMMANDS = ("table", "landscape", "inspect")


class _Clock:
    """CPU and wall-clock seconds since it was made, with the time of a forward pass at both ends."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.forwards = objective, _forward(objective)
        self.cpu, self.wall = _cpu_time(), time.perf_counter()

    def read(self) -> Row:
        cpu, wall = _cpu_time() - self.cpu, time.perf_counter() - self.wall
        forward = statistics.median(self.forwards + _forward(self.objective))
        return {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "forward_seconds": forward,
            "forwards": cpu / forward,
            "load": os.getloadavg()[0],
        }


def _cpu_time() -> float:
    """Return the seconds of this process and of those that it has ended."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@torch.no_grad()
def _forward(objective: Objective, rounds: int = 7) -> list[float]:
    (batch,) = objective.batches()
    times = []
    with one_thread():
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
    rows = []
    for groups in (1, 16):
        objective, generator = task.objective(), torch.Generator().manual_seed(0)
        first, second = (random_direction(objective, generator=generator) for _ in range(2))
        axis = torch.linspace(-1, 1, points)
        clock = _Clock(objective)
        loss_on_plane(objective if groups == 1 else in_groups(objective), first, second, axis, axis)
        what = "landscape" if groups == 1 else f"landscape in {groups} groups"
        found = clock.read()
        per_point = found["forwards"] / points**2
        rows.append({"what": what, "count": points**2, **found, "forwards_per_point": per_point})
    return rows


def _inspection(threads: int) -> list[Row]:
    """Return the row of the command, from the start of its process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        of_torch = statistics.median(_cpu_seconds(["-c", "import torch"], 1) for _ in range(3))
        start = time.perf_counter()
        spent = _cpu_seconds(["-m", "analysis.cli", "inspect", "digits-cnn", "--out", str(out)], threads)
        wall = time.perf_counter() - start
        run = load_run(out)
        assert run.cost is not None
        row = {"what": "curvature inspect", "cpu_seconds": spent, "wall_seconds": wall, "torch_seconds": of_torch}
        row |= {"measuring_wall_seconds": run.cost.seconds, "load": os.getloadavg()[0]}
        return [row]


def _cpu_seconds(arguments: list[str], threads: int) -> float:
    before = _cpu_time()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment, cwd=ROOT)
    return _cpu_time() - before


def main() -> None:
    """Measure and write the rows."""
    parser = command("sharpness", __doc__)
    parser.add_argument("--points", type=int, default=51, help="along each side of the landscape")
    parser.add_argument("--what", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    a = parser.parse_args()
    task = load_task("digits-cnn")
    work: dict[str, Callable[[int], list[Row]]] = {
        "table": lambda _: _table(task),
        "landscape": lambda _: _landscape(task, a.points),
        "inspect": _inspection,
    }
    with Rows(a.out, ("what", "threads"), len(a.what) * len(a.threads)) as rows:
        for what, threads in itertools.product(a.what, a.threads):
            torch.set_num_threads(threads)
            found = work[what](threads)
            rows.add(
                *({"task": "digits-cnn", "threads": threads, **row} for row in found),
                said="; ".join(
                    f"{row['what']}, {threads} threads: {row['cpu_seconds']:.1f} s of CPU time, "
                    f"{row['wall_seconds']:.1f} s by the clock, load {row['load']:.1f}"
                    for row in found
                    if "load" in row
                ),
            )


if __name__ == "__main__":
    main()
