"""Processes that are killed, or cannot be made: every job has an answer all the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.run import pool as pool_module
from analysis.run.cores import answers
from analysis.run.pool import Pool, Worker, can_fork
from curvature.environment.lock import one_at_a_time

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked")

_LOST = "its process ended (exit code -9); out of memory?"


def pool(work: object = lambda job: job) -> Pool[int, object]:
    return Pool(work, 2, lost=lambda job, why: why)  # type: ignore[arg-type]  # noqa: ARG005


def pid_of(worker: Worker) -> int:
    assert worker.process.pid is not None
    return worker.process.pid


def test_a_process_killed_while_it_had_nothing_to_do_is_replaced() -> None:
    with pool() as p:
        p.start("first", 1)
        assert p.answer() == ("first", 1)
        idle = p._free[0]
        os.kill(pid_of(idle), signal.SIGKILL)
        idle.process.join()
        p.start("second", 2)
        assert p.answer() == ("second", 2)


def test_a_process_killed_before_it_read_its_job_is_lost() -> None:
    with pool() as p:
        p.start("first", 1)
        p.answer()
        worker = p._free[0]
        os.kill(pid_of(worker), signal.SIGSTOP)
        p.start("second", 2)
        os.kill(pid_of(worker), signal.SIGKILL)
        worker.process.join()
        assert p.answer() == ("second", _LOST)


def test_a_process_killed_half_way_through_its_answer_is_lost() -> None:
    def work(job: int) -> object:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return np.zeros(10**6 * job)  # more than a pipe takes at once

    with pool(work) as p:
        p.start("large", 4)
        time.sleep(0.6)
        assert p.answer() == ("large", _LOST)


def test_jobs_are_done_here_where_no_process_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    assert dict(answers(lambda job: (job, os.getpid()), range(4), 2, patience=0)) == {
        i: (i, os.getpid()) for i in range(4)
    }


def test_a_process_is_not_forked_while_another_thread_has_moved_parameters() -> None:
    weight, inside, go_on = torch.zeros(()), threading.Event(), threading.Event()

    def look_elsewhere() -> None:
        with one_at_a_time:
            weight.fill_(1.0)
            inside.set()
            go_on.wait(0.3)
            weight.fill_(0.0)

    thread = threading.Thread(target=look_elsewhere)
    thread.start()
    inside.wait()
    with pool(lambda job: float(weight)) as p:  # noqa: ARG005
        p.start("look", 0)
        assert p.answer() == ("look", 0.0)
    go_on.set()
    thread.join()


@pytest.mark.parametrize(("text", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_cores_are_those_of_the_container(
    text: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (quota := tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(pool_module, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert pool_module.usable_cores() == most
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert pool_module.usable_cores() == 1
