"""Devices: which are served, and what is asked of a GPU. Nothing else speaks of CUDA, but for TF32 (`precision`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from curvature.errors import CheckFailedError, InputError

__all__ = [
    "ATTENTION_KERNELS",
    "check_served",
    "default_generators",
    "gpu_memory",
    "is_gpu",
    "refuse_capture",
    "synchronize",
]

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
    free = min(unused[0] + torch.cuda.memory_reserved(gpu), share) - allocated
    return GpuMemory(allocated, torch.cuda.max_memory_allocated(gpu), max(0, free))
