"""Places for runs: reserved before the work, so that no other process takes them, and hindrances show first.

Whoever holds a place has locked the file LOCK in it. The lock goes with the process: one that was killed blocks no one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from analysis.run.folder import (
    ARRAYS,
    CONFIG,
    DRAFT,
    HIDDEN,
    LOCK,
    REPORT,
    RESULTS,
    UNFINISHED,
    is_run,
    own_files,
    put_in_place,
    recover,
)
from curvature.errors import InputError

__all__ = ["Place", "reserve", "reserve_free", "stem_of"]

_LEAST_ROOM = 1 << 18  # bytes: the numbers of a small run; without room for more the report is left out, and told
_LONGEST_NAME = 200  # bytes; file systems take 255


class _TakenError(InputError):
    """The place belongs to another run."""


class Place:
    """A folder that this process has reserved for a run; as a context, it is given up at the end.

    Args:
        folder: absolute path, links resolved.
        shown: the path as it was asked for.
        lock: descriptor of the locked file in it.
        made: folders that were made for it, outermost first; they go again if they stay empty.
    """

    def __init__(self, folder: Path, shown: Path, lock: int, made: list[Path]) -> None:
        self.folder, self.shown = folder, shown
        self._lock, self._made = lock, made

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def check_room(self, num_bytes: float) -> None:
        """Refuse a file system that has not so many bytes left.

        Raises:
            InputError: with what is there and what is needed.
        """
        total, _, free = shutil.disk_usage(self.folder)
        if total > 0 and free < num_bytes:  # some file systems do not tell
            raise InputError(
                f"{self.shown} is on a file system with {_mebibytes(free)} left, and the run takes about "
                f"{_mebibytes(num_bytes)}; make room, or choose another place with --out."
            )

    def begin(self) -> Path:
        """Return the draft, an empty folder that the run is written to.

        Raises:
            OSError: if it cannot be made, or the place was removed or taken over since.
        """
        if not _same_file(self._lock, self.folder / LOCK):
            raise OSError(errno.ENOENT, "the folder was removed while the run was measured")
        draft = self.folder / DRAFT
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        return draft

    def put(self) -> None:
        """Move the finished draft to its place, for the run that was there; on a failure that one is there again.

        Raises:
            OSError: if a file cannot be moved.
        """
        put_in_place(self.folder)

    def drop(self) -> None:
        """Delete the draft."""
        shutil.rmtree(self.folder / DRAFT, ignore_errors=True)

    def release(self) -> None:
        """Let others have the place; what was made for it goes unless there is something in it."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            if _same_file(self._lock, self.folder / LOCK):
                (self.folder / LOCK).unlink()
        os.close(self._lock)
        self._lock = -1
        _remove_empty(self._made)


# -- reserving --------------------------------------------------------------------------------------------------------


def reserve(folder: Path, *, overwrite: bool = False, resume: bool = False) -> Place:
    """Make or take a folder for a run, so that nobody else does, and find out now whether it can be written to.

    Args:
        folder: where; parents are made. It must not exist, or be empty, or hold a run that `overwrite` gives up.
        overwrite: the run that is there may be replaced; files beside it are kept.
        resume: what was begun there and not finished is to be continued.

    Raises:
        InputError: if it is a file or leads nowhere, holds a run that is not given up or anything else, is being
            written by another process, or cannot be written to.
    """
    shown, made = Path(folder), list[Path]()
    try:
        path = _target(shown)
        for attempt in range(100):
            _refuse_what_is_not_ours(path, shown)
            try:
                made += _make(path, shown)
                place = Place(path, shown, _locked(path, shown), made)
                break
            except FileNotFoundError:  # another process gave it up in between
                if attempt == 99:
                    raise
        try:
            recover(path)
            _refuse_what_is_taken(path, shown, overwrite=overwrite, resume=resume)
            place.check_room(_LEAST_ROOM)
        except BaseException:
            place.release()
            raise
    except InputError:
        _remove_empty(made)
        raise
    except (OSError, ValueError) as error:  # ValueError: characters that no path may hold
        _remove_empty(made)
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot write to {shown}: {why}; choose another place with --out.") from error
    return place


def reserve_free(parent: Path, name: str) -> Place:
    """Reserve parent/name-n with the smallest n >= 1 that is not taken, not even by a process beside this one.

    Raises:
        InputError: if nothing can be written there.
    """
    number = 0
    while True:
        number += 1
        folder = parent / f"{stem_of(name)}-{number}"
        try:
            if not os.path.lexists(folder) or (folder / LOCK).is_file():  # the latter was left by one that was killed
                return reserve(folder)
        except OSError as error:
            raise InputError(f"cannot write to {parent}: {error.strerror}; choose a place with --out.") from error
        except _TakenError:
            continue


def stem_of(name: str) -> str:
    """Return what the folders of runs of this name begin with: a name that every file system takes."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    return stem.encode("utf-8", "ignore")[:_LONGEST_NAME].decode("utf-8", "ignore")


def _target(shown: Path) -> Path:
    """Return the absolute path, of the folder a link leads to if it is one."""
    path = shown.absolute()
    if not path.is_symlink():
        return path
    try:
        path.stat()
    except OSError as error:
        raise InputError(
            f"{shown} is a link that leads nowhere ({error.strerror}); remove it, or choose another folder with --out."
        ) from error
    return Path(os.path.realpath(path))


def _make(path: Path, shown: Path) -> list[Path]:
    """Make a folder and its parents, and return those that were not there."""
    missing, at = list[Path](), path
    while not os.path.lexists(at):
        missing.append(at)
        at = at.parent
    made = list[Path]()
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # made by another process since
                folder.mkdir()
                made.append(folder)
    except BaseException:
        _remove_empty(made)
        raise
    if not path.is_dir():
        raise InputError(f"{shown} is a file, and a run is a folder; choose another place with --out.")
    return made


def _remove_empty(made: list[Path]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):  # in use by now
            folder.rmdir()


def _locked(path: Path, shown: Path) -> int:
    """Return the descriptor of the file that marks a place as taken, locked by this process."""
    while True:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            ours = _lock(lock)
        except BaseException:
            os.close(lock)
            raise
        if ours and _same_file(lock, path / LOCK):
            _sign(lock)
            return lock
        holder = _holder(lock)
        os.close(lock)
        if not ours:
            raise _TakenError(f"{shown} is being written by {holder}; wait for it, or choose another folder.")


def _lock(lock: int) -> bool:
    """Lock a file unless another process has; where the file system knows no locks, the process must be gone."""
    try:
        import fcntl
    except ImportError:  # Windows
        return not _alive(_read(lock))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return not _alive(_read(lock))
    return True


def _sign(lock: int) -> None:
    """Write into the lock who holds it."""
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat()}
    with contextlib.suppress(OSError):  # a full disk is found out elsewhere
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(who).encode())


def _holder(lock: int) -> str:
    who = _read(lock)
    return f"process {who['pid']} on {who.get('host')}" if "pid" in who else "another process"


def _read(lock: int) -> dict[str, Any]:
    try:
        os.lseek(lock, 0, os.SEEK_SET)
        who = json.loads(os.read(lock, 4096))
    except (OSError, ValueError):
        return {}
    return who if isinstance(who, dict) else {}


def _alive(who: dict[str, Any]) -> bool:
    pid, here = who.get("pid"), who.get("host") == socket.gethostname()
    return isinstance(pid, int) and (not here or (pid != os.getpid() and psutil.pid_exists(pid)))


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _refuse_what_is_not_ours(path: Path, shown: Path) -> None:
    """Refuse a folder with files of others and no run, before anything is written to it."""
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()} - {*HIDDEN, "lost+found"}
    if names and not is_run(path):
        raise _TakenError(
            f"{shown} holds files that are no run; they are left alone. Choose an empty or new folder with --out."
        )


def _refuse_what_is_taken(path: Path, shown: Path, *, overwrite: bool, resume: bool) -> None:
    if is_run(path) and not overwrite:
        raise _TakenError(
            f"{shown} holds an earlier run; choose another folder with --out, or replace it with --overwrite."
        )
    own = own_files(path) if is_run(path) else ()
    names = (CONFIG, RESULTS, ARRAYS, REPORT)
    foreign = [n for n in names if os.path.lexists(path / n) and (n not in own or (path / n).is_dir())]
    if foreign:
        raise _TakenError(
            f"{shown} holds {', '.join(foreign)}, which the run there did not write; move that away, or choose another "
            "folder with --out."
        )
    if (path / UNFINISHED).is_dir() and not resume:
        if not overwrite:
            raise _TakenError(
                f"{shown} was begun and not finished; go on with --resume, begin again with --overwrite, or choose "
                "another folder with --out."
            )
        shutil.rmtree(path / UNFINISHED)


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):.3g} MiB"
