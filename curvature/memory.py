"""How much memory a graph holds, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HeldMemory", "available_memory"]


class HeldMemory(TorchDispatchMode):
    """Watches what is allocated while it is active; `held_bytes()` says what of that is still alive.

    It sees every storage an operation returns, on any device, so after building a graph it knows what the graph keeps.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never runs under the compiler; saying so to it would import it, 1.5 s of a first product."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def held_bytes(self) -> int:
        """Return the bytes of the storages seen that are still in use."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(size for _, size in self._storages.values())


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device without paging or failing."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)
