"""Where the vectors of a basis are held: on a device, or in a file."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from curvature.environment.device import gpu_memory, is_gpu
from curvature.errors import InputError
from curvature.linop import MatrixLike
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor

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


def normal_rows(A: MatrixLike, count: int, generator: torch.Generator) -> Tensor:
    """Return (count, n) independent standard normal entries in the working dtype, sharded where A's vectors are.

    They are drawn on the generator's device, on CPUs the same whether or not they are sharded.
    """
    n, dtype, device = A.shape[1], torch.promote_types(A.dtype, torch.float32), generator.device
    sharding: Layout | None = getattr(A, "sharding", None)
    if sharding is None:
        return torch.randn(count, n, generator=generator, dtype=dtype, device=device)
    draw = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    return ShardedTensor(sharding.drawn(draw, count, dtype), sharding)


def spare_bytes(place: Place, *, size_given: bool) -> int:
    """Return what a basis may grow to for the search of missed pairs: 256 MiB, or a quarter of what a GPU has free.

    The latter only where the size of the basis was not given.
    """
    if size_given or not isinstance(place, torch.device) or not is_gpu(place):
        return _SPARE_BYTES
    return max(_SPARE_BYTES, gpu_memory(place).free // 4)


def entries_held(A: MatrixLike) -> int:
    """Return how many entries of a vector that A multiplies are held here: of sharded ones, the most on any rank."""
    sharding: Layout | None = getattr(A, "sharding", None)
    return int(A.shape[1]) if sharding is None else sharding.most_held


def empty_rows(count: int, n: int, dtype: torch.dtype, place: Place, sharding: Layout | None = None) -> Tensor:
    """Return (count, n) entries, sharded where vectors are; on disk, in a file of the folder for temporary files.

    The file goes with the tensor. It has no name (on Windows it is deleted when it is closed), so that nothing is left
    whatever happens. Its pages count as memory of the process while they are in use, and the system writes them out
    when it needs room.
    """
    if sharding is not None:
        return ShardedTensor(empty_rows(count, sharding.num_local, dtype, place), sharding)
    size = count * n * dtype.itemsize
    if place != "disk" or size == 0:
        return torch.empty(count, n, dtype=dtype, device="cpu" if place == "disk" else place)
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(count, n)
