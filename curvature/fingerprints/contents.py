"""What tensors held when they were looked at, and whether they still hold it.

Version counters do not tell: fused optimizers, writes through `.data` and NumPy views bump none. Tensors in main memory
are copied and compared byte by byte, as long as copies are small; of the others a digest is taken.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Hashable, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from curvature.fingerprints.digest import WORDS, digest, groups, is_view, numbers, stripes

__all__ = ["Contents"]

_KIND = operator.attrgetter("shape", "dtype", "__class__")
_VERSION = operator.attrgetter("_version")


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
        views = [*map(is_view, tensors)]
        self._flat = [*compress(tensors, views)]
        self._counted = [t for t in tensors if not t.is_inference()]
        self.places = self._present_places()
        self._parts: list[Any] = []  # not by numpy(), after which no storage can be resized
        self._rest: list[Tensor] = []
        for t, flat in zip(tensors, views, strict=True):
            size = t.element_size() * min(t.numel(), most or t.numel())
            in_memory = flat and t.device.type == "cpu" and t.element_size() in WORDS and t.data_ptr() != 0
            if size > room or not in_memory:
                self._rest.append(t)
                continue
            room -= size
            count, length, gap = (1, t.numel(), 0) if most is None or size == t.nbytes else stripes(t.numel(), most)
            part, start = ctypes.c_char * (length * t.element_size()), t.data_ptr()
            self._parts += [part.from_address(start + i * gap * t.element_size()) for i in range(count)]
        kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        self._copies = [*map(bytearray, self._parts)]
        self._read = groups(self._rest, most) if all(map(is_view, self._rest)) else None
        self._numbers = self._present_numbers()
        self.found = (kinds, self._copies, self._numbers)

    def stand(self) -> bool:
        """Say whether the tensors lie where they lay and hold what they held."""
        return (
            self.places == self._present_places()  # else the views may be of memory that is no more
            and self._copies == self._parts
            and self._numbers == self._present_numbers()
        )

    def _present_places(self) -> list[Hashable]:
        flat = self._flat
        kinds = map(_KIND, self._tensors)
        where = zip(map(Tensor.data_ptr, flat), map(Tensor.stride, flat), map(Tensor.is_neg, flat), strict=True)
        return [*map(_VERSION, self._counted), *kinds, *where]

    def _present_numbers(self) -> tuple[int, ...]:
        if not self._rest:
            return ()
        return digest(self._rest, most=self._most) if self._read is None else numbers(self._read)
