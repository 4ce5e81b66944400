"""Jobs spread over processes: each is a call `function(context, job)` whose answer is plain values.

Processes are started as `python -m analysis.generalization.workers`, so that a script which asks for them is not run
again; they end with their parent, whatever ends that. What cannot be sent to one is computed here, one job after the
other, and the caller is told so.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from curvature.errors import CurvatureError, InputError

__all__ = ["usable_cores", "work"]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    with contextlib.suppress(AttributeError):  # where there is no affinity
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work(
    function: str, context: Any, jobs: Sequence[Any], processes: int, told: list[str]
) -> Iterator[tuple[int, Any]]:
    """Yield the index of each job and its answer, as they come.

    Args:
        function: "package.module:name" of `f(context, job)`, whose answer JSON can hold.
        context: what all jobs share; pickled once.
        jobs: plain values.
        processes: at most so many.
        told: takes a sentence if other processes could not be used.

    Raises:
        CurvatureError: what a job has raised.
    """
    done: set[int] = set()
    if min(processes, len(jobs)) > 1:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "context"
            try:
                path.write_bytes(pickle.dumps(context))
            except Exception as error:  # whatever a user's object raises
                told.append(f"All was computed in one process: the task cannot be sent to others ({_line(error)}).")
            else:
                for index, answer in _spread(function, path, jobs, min(processes, len(jobs)), told):
                    done.add(index)
                    yield index, answer
    run = _named(function)
    for index, job in enumerate(jobs):
        if index not in done:
            yield index, run(context, job)


def _named(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


def _spread(function: str, path: Path, jobs: Sequence[Any], count: int, told: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield what workers answer; end early, with a sentence told, if they cannot read the context."""
    answers: Queue[tuple[int | None, Any]] = Queue()
    left = list(enumerate(jobs))[::-1]
    lock = threading.Lock()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "analysis.generalization.workers", function, str(path)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(count)
    ]

    def feed(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        answer = worker.stdout.readline()
        if answer.strip() != "ready":
            answers.put((None, answer.strip() or "a process ended before it began"))
            return
        while True:
            with lock:
                if not left:
                    break
                index, job = left.pop()
            try:
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
            except OSError:
                answer = ""
            if not answer:
                answers.put((-1, f"a process that trained ended (job {job}); was there too little memory?"))
                return
            answers.put((index, json.loads(answer)))

    threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(jobs)):
            index, answer = answers.get()
            if index is None:
                told.append(f"All was computed in one process: others cannot load the task ({answer}).")
                return
            if index < 0 or "error" in answer:
                raise InputError(answer if index < 0 else answer["error"])
            yield index, answer["answer"]
    finally:
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # of what was still to be written
                        stream.close()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer jobs, a line each, until there are no more."""
    function, path = sys.argv[1:]
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a model prints goes elsewhere
    try:
        run, context = _named(function), pickle.loads(Path(path).read_bytes())
    except Exception as error:
        print(_line(error), file=out)
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    print("ready", file=out)
    for line in sys.stdin:
        try:
            answer = {"answer": run(context, json.loads(line))}
        except CurvatureError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()
