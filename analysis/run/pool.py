"""Jobs in processes of their own: the next free one takes the next that is due, and none outlives its parent."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from curvature.environment.device import any_gpu
from curvature.environment.lock import one_at_a_time

__all__ = ["Pool", "Worker", "can_fork", "run_all", "usable_cores", "workers_of"]

J = TypeVar("J")
A = TypeVar("A")
T = TypeVar("T")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_WATCH = 0.5  # seconds between looks whether the parent is alive


def can_fork() -> bool:
    """Say whether processes can be forked: without that models and losses would have to be pickled.

    Where there is a GPU, autograd refuses backward passes in a process that was forked.
    """
    return sys.platform == "linux" and not any_gpu()


def workers_of(asked: int | None, most: int) -> int:
    """Return how many processes work where so many were asked for, or one a core, at most one for each job."""
    return max(1, min(asked or usable_cores(), most)) if can_fork() else 1


def usable_cores() -> int:
    """Return how many cores this process may use, by its affinity and by the share of a container."""
    cores = os.cpu_count() or 1
    with contextlib.suppress(AttributeError):  # where there is no affinity
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


class Pool(Generic[J, A]):
    """Processes that each do one job at a time; with one worker, or where processes cannot be forked, this one does.

    Args:
        work: answers a job; it raises nothing that it could tell in its answer.
        workers: how many, with a thread each.
        lost: the answer for a job whose process ended.
    """

    def __init__(self, work: Callable[[J], A], workers: int, *, lost: Callable[[J, str], A]) -> None:
        self._work, self._lost = work, lost
        self.workers = workers if workers == 1 or can_fork() else 1
        self._free: list[Worker] = []
        self._busy: dict[Connection, tuple[Worker, Any, J]] = {}
        self._done: deque[tuple[Any, A]] = deque()

    def __enter__(self) -> Pool[J, A]:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in [*self._free, *(worker for worker, _, _ in self._busy.values())]:
            worker.end()

    @property
    def has_room(self) -> bool:
        return len(self._busy) + len(self._done) < self.workers

    def start(self, key: Any, job: J) -> None:
        """Begin a job."""
        if self.workers == 1:
            self._done.append((key, self._work(job)))
            return
        while self._free:
            if self._given(worker := self._free.pop(), key, job):
                return
            worker.end()  # it was killed while it had nothing to do
        try:
            worker = Worker(self._work)
        except OSError:  # no more processes may be made, or there is no memory for one
            self._done.append((key, self._work(job)))
            return
        if not self._given(worker, key, job):
            self._done.append((key, self._lost(job, worker.why_lost())))
            worker.end()

    def _given(self, worker: Worker, key: Any, job: J) -> bool:
        """Send a job to a process, and say whether it took it."""
        try:
            worker.ours.send(job)
        except OSError:
            return False
        self._busy[worker.ours] = worker, key, job
        return True

    def answer(self) -> tuple[Any, A]:
        """Wait for a job to be done and return its key and its answer."""
        if self._done:
            return self._done.popleft()
        connection = wait(list(self._busy))[0]
        assert isinstance(connection, Connection)
        worker, key, job = self._busy.pop(connection)
        try:
            found: A = connection.recv()
        except (EOFError, OSError):  # killed before it read the job, at work, or half way through its answer
            why = worker.why_lost()
            worker.end()
            return key, self._lost(job, why)
        self._free.append(worker)
        return key, found


class Worker:
    """A process and this end of the connection to it."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")  # models and losses need not be pickled
        self.process = context.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
        try:
            # the lock, so that another thread's analysis has not moved parameters for a look elsewhere;
            # Python warns of threads, here of a progress bar, that a child does not have
            with one_at_a_time, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.process.start()
        except OSError:
            self.ours.close()
            raise
        finally:
            theirs.close()

    def why_lost(self) -> str:
        """Say how the process ended, once it has."""
        self.process.join()
        return f"its process ended (exit code {self.process.exitcode}); out of memory?"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.ours.close()


def _serve(work: Callable[[Any], Any], theirs: Connection, parent: int) -> None:
    """Answer jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            theirs.send(work(theirs.recv()))
    os._exit(0)


def _watch(parent: int) -> None:
    """End this process when its parent was killed: a pipe that other children hold open does not tell."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


def run_all(
    plays: Sequence[Generator[list[J], list[A], T]],
    pool: Pool[J, A],
    *,
    known: Callable[[J], A | None],
    found: Callable[[J, A], None],
) -> list[T]:
    """Play all generators to their ends: each yields jobs, is sent their answers in order, and returns something.

    Args:
        plays: the generators.
        pool: does the jobs.
        known: the answer of a job that was done before.
        found: told every new answer.
    """
    outcomes: dict[int, T] = {}
    answers: dict[int, list[A | None]] = {}
    due: deque[tuple[int, int, J]] = deque()

    def go_on(play: int, sent: list[A] | None) -> None:
        try:
            jobs = next(plays[play]) if sent is None else plays[play].send(sent)
        except StopIteration as end:
            outcomes[play] = end.value
            return
        answers[play] = [None] * len(jobs)
        due.extend((play, i, job) for i, job in enumerate(jobs))
        if not jobs:
            go_on(play, [])

    def take(play: int, i: int, answer: A) -> None:
        answers[play][i] = answer
        have = [a for a in answers[play] if a is not None]
        if len(have) == len(answers[play]):
            go_on(play, have)

    for play in range(len(plays)):
        go_on(play, None)
    running = 0
    while due or running:
        while due and pool.has_room:
            play, i, job = due.popleft()
            before = known(job)
            if before is not None:
                take(play, i, before)
            else:
                pool.start((play, i, job), job)
                running += 1
        if running:
            (play, i, job), answer = pool.answer()
            running -= 1
            found(job, answer)
            take(play, i, answer)
    return [outcomes[play] for play in range(len(plays))]
