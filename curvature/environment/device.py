"""Devices: which are served, and what is asked of a GPU. Nothing else speaks of CUDA, but for TF32 (`precision`)."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from curvature.errors import CheckFailedError, InputError

__all__ = [
    "ATTENTION_KERNELS",
    "CapturedCall",
    "beside",
    "check_served",
    "default_generators",
    "gpu_memory",
    "is_gpu",
    "refuse_capture",
    "seconds_to_start",
    "synchronize",
]

T = TypeVar("T")

ATTENTION_KERNELS: dict[SDPBackend, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    SDPBackend.FLASH_ATTENTION: (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    SDPBackend.CUDNN_ATTENTION: (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    SDPBackend.MATH: (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
"""Whether a kernel may be taken, on any device, and how that is switched."""


def is_gpu(device: torch.device) -> bool:
    """Say whether a device is one of CUDA's, those of ROCm builds included."""
    return device.type == "cuda"


def any_gpu() -> bool:
    """Say whether this machine has a device that autograd starts threads for, in use or not."""
    return torch.accelerator.is_available()


def check_served(device: torch.device) -> None:
    """Refuse devices on which nothing was ever measured or tested.

    Raises:
        InputError: for others than CPUs and CUDA devices.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"the parameters lie on {str(device)!r}, and curvature is computed on 'cpu' and 'cuda' devices only: call "
            "model.to('cpu') first."
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that clocks mean something."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise CheckFailedError where work on the device is being recorded into a CUDA graph."""
    if is_gpu(device) and torch.cuda.is_current_stream_capturing():
        raise CheckFailedError(f"{why}: take it outside of the CUDA graph.")


def default_generators(devices: Iterable[torch.device] | None) -> list[torch.Generator]:
    """Return what torch draws from by default: the generators of the CPU and of the GPUs among some devices.

    None stands for all GPUs once this process uses any: asking a GPU for its state would start it.
    """
    if devices is None:
        numbers = set(range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))
    else:
        numbers = {torch.cuda.current_device() if d.index is None else d.index for d in devices if is_gpu(d)}
    return [torch.default_generator, *(torch.cuda.default_generators[number] for number in sorted(numbers))]


class GpuMemory(NamedTuple):
    """Bytes that torch has handed out, the most there ever were, and those it can still have."""

    allocated: int
    peak: int
    free: int


def gpu_memory(gpu: torch.device) -> GpuMemory:
    """Return what memory is in use and free, no more than torch's share (`set_per_process_memory_fraction`)."""
    allocated, unused = torch.cuda.memory_allocated(gpu), torch.cuda.mem_get_info(gpu)
    share = int(torch.cuda.get_per_process_memory_fraction(gpu) * unused[1])
    pool = _pools.get(_number(gpu))
    captured = 0 if pool is None else pool.num_bytes  # reserved, and nobody else's
    free = min(unused[0] + torch.cuda.memory_reserved(gpu), share) - allocated - captured
    return GpuMemory(allocated, torch.cuda.max_memory_allocated(gpu), max(0, free))


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def seconds_to_start(device: torch.device, work: Callable[[], T]) -> tuple[float, float, T]:
    """Return how long the host took to start work on a GPU, how long it all took, and what came of it."""
    synchronize(device)
    begin = time.perf_counter()
    result = work()
    started = time.perf_counter()
    synchronize(device)
    return started - begin, time.perf_counter() - begin, result


@contextlib.contextmanager
def beside(gpu: torch.device) -> Iterator[None]:
    """Have work done on the stream that `CapturedCall` records; it comes after what was asked before, before the rest.

    Backward passes run on the streams of their forward passes, so what is differentiated in a captured call has to be
    recorded here.
    """
    number = _number(gpu)
    if number not in _streams:
        _streams[number] = torch.cuda.Stream(number)
    stream = _streams[number]
    stream.wait_stream(torch.cuda.current_stream(number))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(number).wait_stream(stream)


class CapturedCall:
    """A function of one tensor, the kernels of which are started all at once (a CUDA graph).

    What else the kernels read and write stays where it was: the caller keeps it, and changes nothing of it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        number = _number(x.device)
        self._pool = _pools.setdefault(number, _Pool())
        self._x = x.clone()
        with beside(x.device):
            function(self._x)  # which makes what it keeps
            if _waits(lambda: function(self._x)):
                raise RuntimeError("the host waits for a result within")
            synchronize(x.device)
            before = torch.cuda.memory_reserved(number)
            self._graph, self._result = _recorded(lambda: function(self._x), self._pool)
            grown = max(0, torch.cuda.memory_reserved(number) - before)
        self._pool.num_bytes += grown
        self.num_bytes = grown + self._x.nbytes
        """Memory that is held for it alone."""

    @classmethod
    def attempt(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> CapturedCall | None:
        """Record function(x); None if it cannot be, as where the host waits for a result within."""
        try:
            return cls(function, x)
        except Exception:
            _recover(x.device)
            return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return function(x)."""
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


class _Pool:
    """Memory of captured calls, which share it: none runs before another's result was copied."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.num_bytes = 0


_streams: dict[int, torch.cuda.Stream] = {}
_pools: WeakValueDictionary[int, _Pool] = WeakValueDictionary()


def _number(gpu: torch.device) -> int:
    return torch.cuda.current_device() if gpu.index is None else gpu.index


def _waits(work: Callable[[], object]) -> bool:
    """Say whether the host waits for a GPU within some work."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # not "error": that of other threads is their own business
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any("called a synchronizing" in str(warning.message) for warning in caught)


def _recorded(work: Callable[[], Tensor], pool: _Pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
    try:
        result = work()
    finally:
        try:
            graph.capture_end()
        except Exception:  # after which the allocator has not heard of the end
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool.handle)
            torch._C._cuda_releasePool(device, pool.handle)
            raise
    return graph, result


def _recover(gpu: torch.device) -> None:
    """After a capture that failed, record something that works: the generator has to hear of an end."""
    _streams.pop(_number(gpu), None)
    with contextlib.suppress(RuntimeError), beside(gpu):
        _recorded(lambda: torch.zeros(1, device=gpu), _Pool())
