"""What tensors held when they were looked at, and whether they still hold it.

Version counters do not tell: fused optimizers, writes through `.data` and NumPy views bump none. Tensors in main memory
are copied and compared byte by byte, as long as copies are small; of the others a digest is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.fingerprints.digest import WORDS, digest, groups, is_view, numbers, striped, version

__all__ = ["Contents"]


class Contents:
    """One look at the contents of tensors.

    Args:
        tensors: of any dtype, layout and device.
        most: how many entries of a tensor are looked at, in evenly spread stripes. Default: all.
        room: bytes that copies may take.

    Attributes:
        places: where the tensors lie, with their version counters, shapes and dtypes.
        found: equal for equal contents.
    """

    def __init__(self, tensors: Sequence[Tensor], most: int | None = None, *, room: int = 2**22) -> None:
        self._tensors, self._most = tensors, most
        self._views = [is_view(t) for t in tensors]
        self.places = self._present_places()
        self._whole: list[Any] = []  # not by numpy(), after which no storage can be resized
        self._stripes: list[Tensor] = []
        self._rest: list[Tensor] = []
        for t, flat in zip(tensors, self._views, strict=True):
            size = t.element_size() * min(t.numel(), most or t.numel())
            in_memory = flat and t.device.type == "cpu" and t.element_size() in WORDS and t.data_ptr() != 0
            if size > room or not in_memory:
                self._rest.append(t)
                continue
            room -= size
            if size < t.nbytes:
                assert most is not None
                self._stripes.append(striped(t.detach().flatten().view(WORDS[t.element_size()]), most))
            else:
                self._whole.append((ctypes.c_char * size).from_address(t.data_ptr()))
        kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        self._copies = [bytearray(whole) for whole in self._whole]
        self._of_stripes = [stripes.clone(memory_format=torch.contiguous_format) for stripes in self._stripes]
        self._read = groups(self._rest, most) if all(map(is_view, self._rest)) else None
        self._numbers = self._present_numbers()
        parts = [ctypes.string_at(part.data_ptr(), part.nbytes) for part in self._of_stripes]
        self.found = (kinds, self._copies, parts, self._numbers)

    def stand(self) -> bool:
        """Say whether the tensors lie where they lay and hold what they held."""
        return (
            self.places == self._present_places()  # else the views may be of memory that is no more
            and self._copies == self._whole
            and all(map(torch.equal, self._stripes, self._of_stripes))
            and self._numbers == self._present_numbers()
        )

    def _present_places(self) -> list[Hashable]:
        return [
            (version(t), t.shape, t.dtype, flat and (type(t), t.data_ptr(), t.is_contiguous(), t.is_neg()))
            for t, flat in zip(self._tensors, self._views, strict=True)
        ]

    def _present_numbers(self) -> tuple[int, ...]:
        if not self._rest:
            return ()
        return digest(self._rest, most=self._most) if self._read is None else numbers(self._read)
