"""Where the vectors of a basis are held: on a device, or in a file."""

from __future__ import annotations

import tempfile
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from curvature.environment.device import gpu_memory, is_gpu
from curvature.errors import InputError

BasisDevice: TypeAlias = torch.device | Literal["disk"] | str | None
_SPARE_BYTES = 1 << 28
Place: TypeAlias = torch.device | Literal["disk"]


def place_of(basis_device: BasisDevice, default: torch.device) -> Place:
    """Return where a basis is to be held.

    Raises:
        InputError: if there is no such device.
    """
    if basis_device is None or basis_device == "disk":
        return default if basis_device is None else "disk"
    try:
        return torch.empty(0, device=basis_device).device
    except Exception as error:  # backends raise what they like
        raise InputError(
            f'basis_device must be a device that there is here, such as "cpu", or "disk", got {basis_device!r}.'
        ) from error


def spare_bytes(place: Place, *, size_given: bool) -> int:
    """Return what a basis may grow to for the search of missed pairs: 256 MiB, or a quarter of what a GPU has free.

    The latter only where the size of the basis was not given.
    """
    if size_given or not isinstance(place, torch.device) or not is_gpu(place):
        return _SPARE_BYTES
    return max(_SPARE_BYTES, gpu_memory(place).free // 4)


def empty_rows(count: int, n: int, dtype: torch.dtype, place: Place) -> Tensor:
    """Return (count, n) entries; on disk, in a file of the folder for temporary files that goes with the tensor.

    The file has no name (on Windows it is deleted when it is closed), so that nothing is left whatever happens. Its
    pages count as memory of the process while they are in use, and the system writes them out when it needs room.
    """
    size = count * n * dtype.itemsize
    if place != "disk" or size == 0:
        return torch.empty(count, n, dtype=dtype, device="cpu" if place == "disk" else place)
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(count, n)
