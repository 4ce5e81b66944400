"""Measurements in processes of their own: alone, for their memory; or several at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, is_dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

__all__ = ["alone", "in_parallel"]

ROOT = Path(__file__).parents[2]


def alone(work: Callable[..., Any], known: dict[str, Any], *, timeout_seconds: float, **arguments: Any) -> Any:
    """Return the row `work(**arguments)` of a process of its own, or `known` and a failure if it dies or hangs.

    By hand: `python -m benchmarks.common.processes MODULE FUNCTION '{"argument": value}'`.
    """
    spec = sys.modules[work.__module__].__spec__  # of `python -m`, whose module is named __main__
    assert spec is not None
    command = [sys.executable, "-m", "benchmarks.common.processes", spec.name, work.__name__, json.dumps(arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return {**known, "failure": f"took more than {timeout_seconds:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**known, "failure": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_parallel(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Any]:
    """Yield `work(*task)` for all tasks, in their order, from so many processes with a thread each."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from (work(*task) for task in tasks)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from (future.result() for future in [pool.submit(work, *task) for task in tasks])


def main(module: str, function: str, arguments: str) -> None:
    """Print a row as JSON; a library's deprecations are no concern, and failures are in the row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = getattr(import_module(module), function)(**json.loads(arguments))
    print(json.dumps(asdict(row) if is_dataclass(row) and not isinstance(row, type) else row))


if __name__ == "__main__":
    main(*sys.argv[1:])
