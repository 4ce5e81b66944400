"""Runs of the command on several processes that `torchrun` has started: one writes and speaks, all compute."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from analysis.tasks import Task
from curvature.data.parts import take
from curvature.errors import InputError
from curvature.objective.shards import spread

__all__ = ["of_torchrun", "share"]

_MINUTES = 10  # that a rank waits for one that does not come


@contextlib.contextmanager
def of_torchrun(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Join the processes that `torchrun` started; yield the arguments that this one is to run with.

    The first rank runs with those given. The others write to a folder that goes with them, and say nothing. `--resume`
    is refused: they would have nothing to go on from.
    """
    if "--resume" in arguments:
        print("error: --resume continues a run of one process; start anew, or resume on one.", file=sys.stderr)
        sys.exit(2)
    dist.init_process_group(timeout=timedelta(minutes=_MINUTES))
    try:
        if dist.get_rank() == 0:
            yield list(arguments)
            return
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(nowhere.fileno(), stream.fileno())
            yield [*arguments, "--out", str(Path(folder) / "run")]
    finally:
        dist.destroy_process_group()


def share(task: Task) -> dict[str, Any]:
    """Return what an objective of the task is to be made with: this rank's data, where the ranks share them out.

    A task whose function made the objective, or spread the model over the ranks, has given each rank its data.

    Raises:
        InputError: for data of which nobody knows how to give each rank its part.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2 or task.prepared is not None:
        return {}
    _, shards, group = spread(task.model, None)
    if shards is not None or group is not None:
        return {}
    rank, ranks, data = dist.get_rank(), dist.get_world_size(), task.train_data
    if isinstance(data, list) and len(data) >= ranks and not isinstance(data[0], Tensor):
        return {"data": data[rank::ranks], "process_group": dist.group.WORLD}
    if not isinstance(data, (tuple, list)) or not all(isinstance(part, Tensor) for part in data):
        raise InputError(
            f"{task.name} has data of type {type(data).__name__}, which are not shared out over {ranks} processes: "
            "return an Objective with this rank's data and process_group=torch.distributed.group.WORLD."
        )
    count = len(data[0])
    return {
        "data": take(tuple(data), range(rank * count // ranks, (rank + 1) * count // ranks), count, flattened=True),
        "process_group": dist.group.WORLD,
    }
