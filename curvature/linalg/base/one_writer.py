"""A folder is written by one process at a time: the system's lock on a file in it, which ends with the process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from pathlib import Path
from typing import Any

from curvature.errors import InputError

__all__ = ["LOCK", "hold"]

LOCK = "lock"
"""Name of the file, which stays."""


def hold(folder: Path, holder: object) -> None:
    """Keep other processes from a folder for as long as the holder lives. Does nothing where files know no locks.

    Raises:
        InputError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # only to be read: a run that is complete is
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: what failed before in it locks nobody out
    except (BlockingIOError, PermissionError):
        who = _holder(file)
        os.close(file)
        raise InputError(
            f"{os.fspath(folder)!r} is being written by {who}: wait until its call has returned, or give checkpoint "
            "another folder."
        ) from None
    except OSError:  # a file system without locks
        os.close(file)
        return
    weakref.finalize(holder, os.close, file)
    with contextlib.suppress(OSError):  # a full disk is found out elsewhere
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _holder(file: int) -> str:
    try:
        who: dict[str, Any] = json.loads(os.pread(file, 4096, 0))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
