"""NumPy arrays in batches, as the tensors that models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["with_tensors"]


def with_tensors(batch: Any) -> Any:
    """Return a batch with its arrays of numbers as tensors of the same dtype, which share their memory if they can."""
    if not _holds_arrays(batch):
        return batch
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch if batch.flags.writeable and _is_plain(batch) else _plain(batch))
    if isinstance(batch, Mapping):
        found = {key: with_tensors(value) for key, value in batch.items()}
        return found if type(batch) is dict else type(batch)(found)  # type: ignore[call-arg]
    items = [with_tensors(value) for value in batch]
    return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def _holds_arrays(batch: Any) -> bool:
    if isinstance(batch, np.ndarray):
        return batch.dtype.kind in "biufc"
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return any(_holds_arrays(part) for part in parts)


def _is_plain(array: np.ndarray) -> bool:
    return array.dtype.isnative and all(stride >= 0 for stride in array.strides)


def _plain(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
