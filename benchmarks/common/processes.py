"""Rows come from processes of their own; one that dies or hangs is a row too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.run.saving import write_text

__all__ = ["BARS", "in_parallel", "row_of", "write_rows"]

ROOT = Path(__file__).parents[2]
BARS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def row_of(module: str, arguments: Sequence[str], known: dict[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
    """Return the JSON in the last line that `python -m module` prints; `known` and a failure if there is none."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return {**known, "failure": f"took more than {timeout_seconds:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**known, "failure": f"exit status {done.returncode}: {last}"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def in_parallel(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Any]:
    """Yield `work(*task)` for all tasks, in their order, from so many processes with a thread each."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from (work(*task) for task in tasks)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from (future.result() for future in [pool.submit(work, *task) for task in tasks])


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, one a line; earlier ones stay until all are on the disk."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
