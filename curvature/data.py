"""The data an objective sums over: batches that can be walked again and again and stay the same.

Sums over a data set do not depend on the order of its batches, so a loader that shuffles is fine. They do depend on the
data: every complete pass over a loader is compared with the first by a fingerprint that is blind to order and sees
everything else (random augmentation, dropped remainders, a stream that runs dry).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.errors import DataError
from curvature.evaluation import map_tensors, tensors_in

__all__ = ["DataSource"]

_FEATURES = 4096  # entries of an example that enter the fingerprint, evenly spread


class DataSource:
    """Batches in memory, or a loader that yields them anew at each pass.

    Args:
        data: one batch (a tuple, a mapping, a tensor), a list of batches, or a loader.
        paired: whether a batch is a pair (inputs, targets): then a list of two tensors is one batch, too.

    Raises:
        DataError: if `data` is empty, an iterator that can be walked once, or cannot be iterated.
    """

    def __init__(self, data: Any, *, paired: bool, micro_batch: int | None = None) -> None:
        self._data = _as_batches(data, paired)
        self._micro_batch = micro_batch
        self.in_memory = isinstance(self._data, list)
        self.num_batches: int | None = None
        self.shuffles = False
        self._marks: list[float] = []
        self._first_pass: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[tuple[int, float, Any]]:
        """Yield (index, fingerprint, batch); check on completion that the pass gave the data of the first pass.

        Raises:
            DataError: if a pass yields nothing, or other data than the first.
        """
        index, total, size = 0, 0.0, 0.0
        for batch in self._pieces():
            mark, magnitude = (0.0, 0.0) if self.in_memory else _fingerprint(batch)
            self._note_order(index, mark)
            total, size = total + mark, size + magnitude
            yield index, mark, batch
            index += 1
        if index == 0:
            raise DataError(
                "the data hold no batch; pass one (inputs, targets) pair, a list of them, or a loader that is not "
                "empty."
            )
        if self._first_pass is None:
            self._first_pass, self.num_batches = (total, size), index
        first_total, first_size = self._first_pass
        if abs(total - first_total) > 1e-9 * max(size, first_size):
            raise DataError(
                "the loader gives other data at each pass (random augmentation, drop_last=True with shuffle=True, or "
                "a stream): the sum "
                "over the data is then no fixed function. Turn that off, or pass list(loader) to work on one fixed "
                "draw."
            )

    def _pieces(self) -> Iterator[Any]:
        for batch in self._data:
            if self._micro_batch is None:
                yield batch
            else:
                yield from _split(batch, self._micro_batch)

    def _note_order(self, index: int, mark: float) -> None:
        if self._first_pass is None:
            self._marks.append(mark)
        elif index >= len(self._marks) or mark != self._marks[index]:
            self.shuffles = True


def _as_batches(data: Any, paired: bool) -> Iterable[Any]:
    if isinstance(data, (Tensor, tuple, Mapping)):
        return [data]
    if isinstance(data, list):
        if paired and len(data) == 2 and all(isinstance(item, Tensor) for item in data):
            return [data]
        if not data:
            raise DataError("data is an empty list; pass one (inputs, targets) pair, a list of them, or a loader.")
        return data
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which can be walked only once, but every product walks the data again; "
            "pass a list (list(data)) or a loader that can be iterated repeatedly."
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"data must be an (inputs, targets) pair, a list of them or a loader, got {type(data).__name__}."
        )
    return data


def _split(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch along the first dimension of its tensors; tensors of another length are handed to every piece."""
    leading = [t.shape[0] for t in tensors_in(batch) if t.ndim > 0]
    if not leading:
        raise DataError(
            "micro_batch= cuts batches along the first dimension of their tensors, and this batch has none."
        )
    length = leading[0]
    for start in range(0, length, size):

        def piece(t: Tensor, start: int = start) -> Tensor:
            return t[start : start + size] if t.ndim > 0 and t.shape[0] == length else t

        yield map_tensors(batch, piece)


def _fingerprint(batch: Any) -> tuple[float, float]:
    """Return a number that sums over examples, and the sum of its terms' magnitudes: blind to order, not to content."""
    total, magnitude = 0.0, 0.0
    for place, leaf in enumerate(tensors_in(batch)):
        rows = leaf.detach().reshape(leaf.shape[0], -1) if leaf.ndim > 0 else leaf.detach().reshape(1, 1)
        if rows.numel() == 0:
            continue
        rows = rows[:, :: max(1, rows.shape[1] // _FEATURES)].to("cpu", torch.float64)
        direction = torch.cos(1.0 + place + 12.9898 * torch.arange(rows.shape[1], dtype=torch.float64))
        terms = torch.sin(rows @ direction + place) + rows @ direction
        total += float(terms.sum())
        magnitude += float(terms.abs().sum())
    return total, magnitude
