"""Processes for all tests that need ranks: starting them takes longer than most of these tests do.

They are forked from a server that has imported what they run: once for all ranks, where each would import it anew.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context, start_processes

__all__ = ["IN_TWO_PROCESSES", "in_processes_of_their_own", "in_two_processes", "process_group"]

IN_TWO_PROCESSES = pytest.mark.xdist_group("ranks")
"""Marks tests that share the processes, for one worker of pytest to run them all."""

_pipes: list[Connection] = []


def in_two_processes(work: Callable[[int, str], None], folder: str) -> None:
    """Run work(rank, folder) in two processes that stay; it leaves no process group behind.

    Raises:
        RuntimeError: with the traceback of a rank that failed.
    """
    if not _pipes:
        context = _server(work)
        for rank in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(rank, theirs), daemon=True).start()
            theirs.close()
            _pipes.append(ours)
    try:
        for pipe in _pipes:
            pipe.send((work, folder))
        said = [pipe.recv() for pipe in _pipes]
    except (EOFError, OSError):
        _pipes.clear()
        raise
    if failures := [text for text in said if text]:
        raise RuntimeError("\n".join(failures))


def in_processes_of_their_own(work: Callable[[int, str], None], folder: str, count: int) -> None:
    """Run work(rank, folder) in so many processes that may end as they like.

    Raises:
        ProcessRaisedException: with the traceback of a rank that failed.
        ProcessExitedException: where one ended otherwise than with 0.
    """
    _server(work)
    start_processes(work, (folder,), nprocs=count, start_method="forkserver")


def _server(work: Callable[[int, str], None]) -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", work.__module__])  # heeded before the server starts
    return context


@contextlib.contextmanager
def process_group(rank: int, folder: str) -> Iterator[None]:
    """Have the two processes be ranks of one group, on one thread each."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _serve(rank: int, pipe: Connection) -> None:
    while True:
        try:
            work, folder = pipe.recv()
        except EOFError:
            return
        try:
            work(rank, folder)
        except Exception:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
        else:
            pipe.send("")
