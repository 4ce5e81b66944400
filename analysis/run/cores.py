"""Many looks at a small model on all cores: a process on each, where an operation is too small to share among threads.

An operation of a small model takes a fraction of a millisecond, of which two threads save little and, where another
program has one of the cores, lose a great deal by waiting for each other. Jobs that do not depend on one another lose
nothing: each process does one at a time with one thread. So numbers are those of one thread, however many there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from analysis.run.pool import Pool, Worker, can_fork, usable_cores
from curvature.data.tensors import tensors_in
from curvature.environment.memory import available_memory
from curvature.objective.objective import Objective

__all__ = ["answers", "in_background", "is_tiny", "one_core_each", "one_thread", "spare_cores"]

J = TypeVar("J")
A = TypeVar("A")
_SMALL = 2**28  # bytes of graphs and parameters: a process holds as many again
_TINY = 2**21  # bytes of parameters and data: a pass over these gains little by threads


@contextlib.contextmanager
def one_core_each(objective: Objective) -> Iterator[int]:
    """Yield how many processes jobs on an objective are for, with torch at one thread inside if these are several.

    They are as many as torch has threads and memory allows: `torch.set_num_threads(1)`, or `OMP_NUM_THREADS=1`, stands
    for one core. One does the work, with its threads, for a model on a GPU or on several ranks, where processes cannot
    be forked, for batches from a loader and for what is not small.
    """
    workers = spare_cores()
    workers = min(workers, _most(objective)) if workers > 1 else 1
    with one_thread() if workers > 1 else contextlib.nullcontext():
        yield max(workers, 1)


def spare_cores() -> int:
    """Return how many processes may share work that is not torch's: one for each thread that torch has, if they can."""
    apart = can_fork() and not multiprocessing.current_process().daemon  # which may have no children
    return min(torch.get_num_threads(), usable_cores()) if apart else 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _most(objective: Objective) -> int:
    """Return how many processes can hold an objective."""
    on_a_cpu = objective.device.type == "cpu" and objective.ranks is None and objective.shards is None
    if not (on_a_cpu and objective.source.in_memory and objective.may_keep_graphs):
        return 1
    if not objective.keeps_all_graphs:
        objective.loss()  # builds what can be kept
    held = objective.held_bytes + 2 * sum(p.nbytes for p in objective.model.parameters())
    if not objective.keeps_all_graphs or held > _SMALL:
        return 1
    return int(available_memory(objective.device) // (2 * max(held, 1)))


def answers(
    work: Callable[[J], A],
    jobs: Sequence[J],
    workers: int,
    *,
    patience: float,
    begun: Callable[[J], object] = lambda _: None,
) -> Iterator[tuple[int, A]]:
    """Yield the place of each job and its answer, as they come: from here for `patience` seconds, then from processes.

    A job whose process ended, or in which it raised an error, is done again here. `work` must not depend on the order
    of jobs, nor change anything that later ones read. `begun` is told each job as it is handed out.
    """
    due, start = deque(range(len(jobs))), time.perf_counter()
    while due and (workers == 1 or time.perf_counter() - start < patience):
        i = due.popleft()
        begun(jobs[i])
        yield i, work(jobs[i])

    def attempt(i: int) -> tuple[A] | None:  # places are sent: jobs are there, as the process is a copy of this one
        return _answered(lambda: work(jobs[i]))

    with Pool(attempt, min(workers, max(1, len(due))), lost=lambda i, why: None) as pool:  # noqa: ARG005 - done again
        running = 0
        while due or running:
            while due and pool.has_room:
                i = due.popleft()
                begun(jobs[i])
                pool.start(i, i)
                running += 1
            i, answer = pool.answer()
            running -= 1
            yield i, work(jobs[i]) if answer is None else answer[0]


@contextlib.contextmanager
def in_background(objective: Objective, work: Callable[[], A]) -> Iterator[Callable[[], A]]:
    """Yield what waits for the answer of work on a tiny objective: a process does it beside what is done inside.

    Elsewhere it is done here, first. An error of the work is raised by the wait, and, where something inside fails
    before that, in its place: work such as a check says more of the cause.
    """
    worker: Worker | None = None
    if spare_cores() > 1 and is_tiny(objective):
        with contextlib.suppress(OSError):  # no more processes may be made
            worker = Worker(lambda _: _answered(work))
    found, pending = ([(work(),)], []) if worker is None else ([], [worker])

    def wait() -> A:
        if not found:
            answer = None
            if pending:
                with contextlib.suppress(EOFError, OSError):  # its process was killed
                    answer = pending.pop().ours.recv()
            found.append((work(),) if answer is None else answer)  # an error is raised here
        return found[0][0]

    try:
        for each in pending:
            each.ours.send(None)
        yield wait
    except Exception:
        if pending:
            wait()
        raise
    finally:
        if worker is not None:
            worker.end()


def _answered(work: Callable[[], A]) -> tuple[A] | None:
    try:
        return (work(),)
    except Exception:  # raised where the job is done again
        return None


def is_tiny(objective: Objective) -> bool:
    """Say whether a pass over the data is so small that threads gain little, and lose much beside other programs."""
    source = objective.source
    on_a_cpu = objective.device.type == "cpu" and objective.ranks is None and objective.shards is None
    if not on_a_cpu or not source.in_memory:
        return False
    tensors = [*objective.model.parameters(), *(t for batch in source.given for t in tensors_in(batch))]
    return sum(t.nbytes for t in tensors) <= _TINY
