"""What products cost and how much memory there is: clocks, peaks, and what is refused before it fails."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import psutil
import torch

from curvature.environment.device import gpu_memory, is_gpu, synchronize
from curvature.environment.memory import PROC, available_memory
from curvature.errors import InputError

__all__ = ["ELSEWHERE", "check_fits", "current_memory", "gibibytes", "median_seconds", "peak_memory", "timed"]

T = TypeVar("T")
_RUNS, _LONG = 5, 0.5  # s


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return what work on a device returns, and the seconds it took."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


class Ranks(Protocol):
    """Processes that do the same work together."""

    def mean(self, *values: float) -> list[float]:
        """Return the means over the ranks."""


def median_seconds(work: Callable[[], object], device: torch.device, ranks: Ranks | None = None) -> float:
    """Return the median of the seconds that work takes, of five runs, or fewer where they take long.

    Ranks that work together run it as often as each other: they go by their mean.
    """
    taken: list[float] = []
    while len(taken) < _RUNS and (not taken or sum(taken) < _LONG):
        seconds = timed(work, device)[1]
        taken.append(seconds if ranks is None else ranks.mean(seconds)[0])
    return statistics.median(taken)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes ever in use: of torch on a CUDA device, else of the process since its start."""
    if is_gpu(device):
        return gpu_memory(device).peak
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # ru_maxrss takes over the peak of the process that started this one
        lines = (PROC / "status").read_text().splitlines()
        found = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
        if found:
            return found[0]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_memory(device: torch.device) -> int:
    """Return the bytes in use now: of torch on a CUDA device, else of the process."""
    return gpu_memory(device).allocated if is_gpu(device) else int(psutil.Process().memory_info().rss)


ELSEWHERE = 'basis_device="cpu" or "disk" holds it there'


def check_fits(num_bytes: int, place: torch.device | Literal["disk"], what: str, remedy: str) -> None:
    """Refuse, with numbers and what would fit, to begin something that the memory cannot hold.

    Raises:
        InputError: if fewer than `num_bytes` are free on the device, or in the folder for temporary files.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free if place == "disk" else available_memory(place)
    if num_bytes > free:
        raise InputError(f"{what} takes {gibibytes(num_bytes)} and {place} has {gibibytes(free)} free; {remedy}.")


def gibibytes(num_bytes: float) -> str:
    """Return a size as people read it."""
    return f"{num_bytes / 2**30:.3g} GiB"
