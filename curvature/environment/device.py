"""Which devices are served, and what is asked of a GPU alone."""

from __future__ import annotations

import torch

from curvature.errors import InputError

__all__ = ["check_served", "gpus", "is_gpu"]


def is_gpu(device: torch.device) -> bool:
    """Say whether a device is one of CUDA's, those of ROCm builds included."""
    return device.type == "cuda"


def gpus(device: torch.device) -> list[torch.device]:
    """Return the device if it is a GPU: what has a random state, a clock and a memory of its own."""
    return [device] if is_gpu(device) else []


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
