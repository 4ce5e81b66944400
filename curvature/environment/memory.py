"""How much memory a graph holds, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.environment.device import gpu_memory, is_gpu

__all__ = [
    "HeldMemory",
    "available_memory",
    "drop_pages",
    "keep_freed",
    "lately_available",
    "return_unused",
    "tensor_bytes",
]

PROC = Path("/proc/self")
_MAPPED = 2**25 - 2**16  # bytes
_MADV_DONTNEED, _PAGE = 4, mmap.PAGESIZE


class HeldMemory(TorchDispatchMode):
    """Watches what is allocated while it is active; `held_bytes()` says what of that is still alive.

    It sees every storage an operation makes, on any device, so after building a graph it knows what the graph keeps.
    Storages that were there before, of parameters and data, are not counted, whatever views the graph has of them.

    Args:
        closed: called each time the watch ends, unless by an error: what is held may have grown.
        room: returns how many bytes more may be held.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never runs under the compiler; saying so to it would import it, 1.5 s of a first product."""
        return False

    def __init__(self, closed: Callable[[], None] | None = None, room: Callable[[], float] = lambda: math.inf) -> None:
        super().__init__()
        self.room = room
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._closed = closed
        self.outside = 0
        """Bytes that are held and were not seen here."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in _parts(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in _parts([*args, *(kwargs or {}).values()])}
            if key not in given:
                reference = StorageWeakRef(storage)
                self._storages[key] = (reference, storage.nbytes())
        return result

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None:
            self.grown()

    def grown(self) -> None:
        """Say that what is held may have grown."""
        if self._closed is not None:
            self._closed()

    def held_bytes(self) -> int:
        """Return the bytes of the storages seen that are still in use, and of what is held outside."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return self.outside + sum(size for _, size in self._storages.values())


def _parts(value: Any) -> Iterator[Tensor]:
    """Yield the tensors with a storage of their own in what an operation takes or returns."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Tensor) and value.layout is torch.strided:
        yield value


# -- what is there ----------------------------------------------------------------------------------------------------


def tensor_bytes(t: Tensor) -> int:
    """Return the bytes of a tensor's entries, and of the indices of a sparse one."""
    if t.layout is torch.strided:
        return t.nbytes
    if t.layout is torch.sparse_coo:
        return t._indices().nbytes + t._values().nbytes
    by_row = t.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (t.crow_indices(), t.col_indices()) if by_row else (t.ccol_indices(), t.row_indices())
    return t.values().nbytes + sum(index.nbytes for index in indices)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device without paging or failing; never negative.

    In main memory: what the machine has free, and no more than what is left below the limits of this process
    (`ulimit -v`, `ulimit -d`) and of its control groups (containers, batch systems), the enclosing ones included. On a
    CUDA device: what is free there, no more than torch's own share (`set_per_process_memory_fraction`).
    """
    if is_gpu(device):
        return gpu_memory(device).free
    rooms = [int(psutil.virtual_memory().available)]
    if sys.platform == "linux":
        rooms += [*_process_rooms(), *_group_rooms(PROC)]
    return max(0, min(rooms))


def lately_available(device: torch.device) -> int:
    """Return what `available_memory` found, up to a second ago: looking takes as long as a small layer."""
    now = time.monotonic()
    found, looked = _LATELY.get(device, (0, -math.inf))
    if now - looked > _PATIENCE:
        _LATELY[device] = found, _ = available_memory(device), now
    return found


_PATIENCE = 1.0  # s
_LATELY: dict[torch.device, tuple[int, float]] = {}


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None for other C libraries."""
    try:
        return cast(Callable[[int], int], ctypes.CDLL("libc.so.6").malloc_trim)
    except (OSError, AttributeError):
        return None


def return_unused() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (tens of milliseconds a GiB)."""
    trim = _trim()
    if trim is not None:
        trim(0)


def drop_pages(t: Tensor) -> None:
    """Let go of the whole pages of a contiguous tensor on the CPU.

    In a shared file mapping they are read again when they are used, with what was written to them; elsewhere the
    contents are lost.
    """
    if sys.platform == "linux":
        first, last = -(-t.data_ptr() // _PAGE) * _PAGE, (t.data_ptr() + t.nbytes) // _PAGE * _PAGE
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


@functools.cache
def keep_freed() -> None:
    """Have the C library keep some tens of MiB that are freed, to be used again without page faults; done once.

    glibc gives back all above twice the largest mapped piece it has seen freed, 32 MiB at most: a few MiB with a small
    network, again and again within one product, a seventh of its time. So a piece of that size is mapped and freed,
    which touches no memory; where thresholds are set by hand it changes nothing.
    """
    with contextlib.suppress(RuntimeError):  # below a limit on the address space
        torch.empty(_MAPPED, dtype=torch.uint8)


def _process_rooms() -> Iterator[int]:
    """Yield what the limits on a Linux process's address space and data leave."""
    import resource

    used = psutil.Process().memory_info()
    for limit, size in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        allowed, _ = resource.getrlimit(limit)
        if allowed != resource.RLIM_INFINITY:
            yield allowed - size


def _group_rooms(proc: Path) -> Iterator[int]:
    """Yield what the limits of the process's control groups leave, from its own group up to the root that is seen.

    Pages of files that were not used lately do not count as used: the kernel drops them first.
    """
    for folder, top, version in _group_folders(proc, os.getpid()):
        limits, usage, cache = _FILES[version]
        while True:
            allowed = [n for n in (_number(folder / name) for name in limits) if n is not None and n < _NO_LIMIT]
            used = _number(folder / usage) if allowed else None
            if used is not None:
                yield min(allowed) - used + _statistic(folder / "memory.stat", cache)
            if folder == top:
                break
            folder = folder.parent


_NO_LIMIT = 1 << 60  # what version 1 writes for none is about 2^63
_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


@functools.cache
def _group_folders(proc: Path, pid: int) -> list[tuple[Path, Path, int]]:
    """Return the folder of a process's memory group, where its hierarchy is mounted, and the version, 1 or 2."""
    del pid  # after a fork another process may have been moved
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines() if " - cgroup" in line]
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind == "cgroup" and "memory" not in options:
            continue
        version = 2 if kind == "cgroup2" else 1
        paths = [path for _, names, path in groups if (names == "" if version == 2 else "memory" in names.split(","))]
        top = Path(fields[4].replace("\\040", " "))
        for path in paths:
            inside = path.removeprefix(fields[3].rstrip("/")).strip("/")  # a container sees part of the hierarchy
            folder = top / inside
            found.append((folder if ".." not in folder.parts and folder.is_dir() else top, top, version))
    return found


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(value) for key, value in lines if key == name), 0)
