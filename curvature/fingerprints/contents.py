"""What tensors held when they were looked at, and whether they still hold it.

Version counters do not tell: fused optimizers, writes through `.data` and NumPy views bump none. Tensors in main memory
are copied and compared byte by byte, as long as copies are small; of the others a digest is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from typing import Any

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
        self.places = self._present_places()
        self._whole: list[Any] = []  # not by numpy(), after which no storage can be resized
        self._stripes: list[Tensor] = []
        self._rest: list[Tensor] = []
        for t in tensors:
            size = t.element_size() * min(t.numel(), most or t.numel())
            in_memory = is_view(t) and t.device.type == "cpu" and t.element_size() in WORDS and t.data_ptr() != 0
            if size > room or not in_memory:
                self._rest.append(t)
                continue
            room -= size
            flat = t.detach().flatten()
            words = flat.view(WORDS[t.element_size()])
            if size < t.nbytes:
                assert most is not None
                self._stripes.append(striped(words, most))
            else:
                self._whole.append((ctypes.c_char * size).from_address(t.data_ptr()))
        kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        self._copies = [bytearray(whole) for whole in self._whole]
        self._part = self._present_part()
        self._read = groups(self._rest, most) if all(map(is_view, self._rest)) else None
        self._numbers = self._present_numbers()
        self.found = (kinds, self._copies, self._part, self._numbers)

    def stand(self) -> bool:
        """Say whether the tensors lie where they lay and hold what they held."""
        return (
            self.places == self._present_places()  # else the views may be of memory that is no more
            and self._copies == self._whole
            and self._part == self._present_part()
            and self._numbers == self._present_numbers()
        )

    def _present_places(self) -> list[Hashable]:
        return [(version(t), t.shape, t.dtype, t.data_ptr() if is_view(t) else None) for t in self._tensors]

    def _present_part(self) -> list[bytes]:
        parts = [stripes.contiguous() for stripes in self._stripes]
        return [ctypes.string_at(part.data_ptr(), part.nbytes) for part in parts]

    def _present_numbers(self) -> tuple[int, ...]:
        return digest(self._rest, most=self._most) if self._read is None else numbers(self._read)
