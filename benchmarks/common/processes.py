"""Measurements in processes of their own: alone, for their memory; in one that is replaced; or several at a time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, is_dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import one_line

__all__ = ["Worker", "alone", "in_parallel"]

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


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
        return {**known, "failure": f"took more than {timeout_seconds:.3g} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**known, "failure": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


class Worker:
    """One process that measures row after row, so that libraries load and devices start once; anew if it dies or hangs.

    Args:
        prepare: called before the first row.
        tidy: called after each row; the process is replaced if that fails, as it does on a GPU that is out of order.
    """

    def __init__(self, prepare: Callable[[], None], tidy: Callable[[], None]) -> None:
        self._target = prepare, tidy
        self._running: tuple[BaseProcess, Connection] | None = None

    def row(self, work: Callable[..., Any], known: dict[str, Any], *, timeout_seconds: float, **arguments: Any) -> Any:
        """Return the row `work(**arguments)`, or `known` and a failure where it raises, dies or hangs."""
        process, connection = self._running or self._start()
        try:
            connection.send((work, arguments))
            if not connection.poll(timeout_seconds):
                self.stop()
                return {**known, "failure": f"took more than {timeout_seconds:.3g} s"}
            row, is_fit = connection.recv()
        except (EOFError, OSError):
            process.join()
            self._running = None
            return {**known, "failure": f"exit status {process.exitcode}"}
        if not is_fit:
            self.stop()
        return {**known, **row}

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            process, connection = self._running
            process.kill()
            process.join()
            connection.close()
            self._running = None

    def _start(self) -> tuple[BaseProcess, Connection]:
        here, there = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=_serve, args=(there, *self._target), daemon=True)
        process.start()
        there.close()
        self._running = process, here
        with contextlib.suppress(EOFError):  # the row will say that it died
            if here.poll(START_SECONDS):
                here.recv()
        return self._running


def _serve(connection: Connection, prepare: Callable[[], None], tidy: Callable[[], None]) -> None:
    warnings.simplefilter("ignore")
    prepare()
    connection.send(None)
    while True:
        work, arguments = connection.recv()
        try:
            row = work(**arguments)
            row = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
        except Exception as error:
            row = {"failure": one_line(error)}
        try:
            tidy()
        except Exception:
            connection.send((row, False))
            return
        connection.send((row, True))


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
