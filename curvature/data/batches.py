"""The data an objective sums over: batches that can be walked again and again and stay the same.

Sums over a data set do not depend on the order of its batches, so a loader that shuffles is fine. They do depend on the
data: every complete pass over a loader is compared with the first by a fingerprint that is blind to order and sees
everything else (random augmentation, inputs paired with other targets, dropped remainders, a stream that runs dry).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from curvature.data.array_inputs import with_tensors
from curvature.data.fingerprints import Fingerprint, fingerprint
from curvature.data.loaders import refuse_repeats, timed
from curvature.data.parts import num_examples, take, ways_to_cut
from curvature.data.random_states import RandomStates, unnoticed
from curvature.errors import DataError

__all__ = ["DataSource"]

_MOST_SAMPLED = 16  # examples of a batch that are kept to test whether it may be cut
_SEEN = Fingerprint((0, 0, 0), 0)  # of what lies in memory


class DataSource:
    """Batches in memory, or a loader that yields them anew at each pass.

    Args:
        data: one batch (a tuple, a mapping, a tensor), a list of batches, or a loader.
        paired: whether a batch is a pair (inputs, targets): then a list of two tensors is one batch, too.
        may_be_empty: where other ranks hold data.

    Raises:
        DataError: if `data` is empty, an iterator that can be walked once, or cannot be iterated.
    """

    def __init__(self, data: Any, *, paired: bool, micro_batch: int | None = None, may_be_empty: bool = False) -> None:
        self.given = _as_batches(data, paired, may_be_empty)
        self._micro_batch, self._paired = micro_batch, paired
        self._may_be_empty = may_be_empty
        self.in_memory = isinstance(self.given, list)
        self.num_batches: int | None = None
        self.shuffles = False
        self.regroups = False
        self.sample: Any = None
        self._order: list[int] = []
        self._groups: set[tuple[int, ...]] = set()
        self._totals: tuple[int, ...] | None = None
        self._num_passes = 0
        self._stream: list[RandomStates] = []

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (index, fingerprint, batch); check on completion that the pass gave the data of the first pass.

        Raises:
            DataError: if a pass yields nothing, or other data than the first.
        """
        index = 0
        totals: tuple[int, ...] = (0, 0, 0)
        for batch in self._pieces():
            mark = _SEEN if self.in_memory else fingerprint(batch)
            self._note_order(index, mark)
            totals = tuple((a + b) % 2**64 for a, b in zip(totals, mark.examples, strict=True))
            yield index, mark.examples[0], batch
            index += 1
        if index == 0 and not self._may_be_empty:
            raise DataError(
                "the data hold no batch; pass one (inputs, targets) pair, a list of them, or a loader that is not "
                "empty."
            )
        if self._totals is None:
            refuse_repeats(self.given, self._order)
            self._totals, self.num_batches = totals, index
        self._num_passes += 1
        if not any(a == b for a, b in zip(totals, self._totals, strict=True)):
            raise DataError(
                "the loader gives other data at each pass (random augmentation, inputs paired with other targets, "
                "drop_last=True with shuffle=True, a stream, or batches whose content depends on which examples meet "
                "in them): the sum over the data is then no fixed function. Turn that off, or pass list(loader) to "
                "work on one fixed draw."
            )

    @property
    def whole(self) -> bool:
        """Whether batches are as they were given."""
        return self._micro_batch is None

    def uncut(self, at_once: int) -> Iterator[tuple[list[Any], int, list[range]]]:
        """Yield of every batch in memory parts of so many examples, their number, and which are those of each piece."""
        for batch in self.given:
            batch = with_tensors(batch) if self._paired else batch
            count = _count(batch)
            parts = list(_split(batch, at_once, flattened=self._paired))
            yield parts, count, _pieces_of(count, self._micro_batch or count)

    def reset(self) -> None:
        """Forget what passes have shown: the data were changed."""
        self.num_batches, self.shuffles = None, False
        self._order, self._totals, self._num_passes = [], None, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": []}  # of this process's generators

    def confirm(self) -> None:
        """Walk a loader until two passes were compared: before graphs of one pass stand for all passes.

        Raises:
            DataError: if they gave other data.
        """
        while not self.in_memory and self._num_passes < 2:
            for _ in self:
                pass

    def _pieces(self) -> Iterator[Any]:
        for batch in self.given if self.in_memory else timed(self.given, unnoticed(self.given, self._stream)):
            batch = with_tensors(batch) if self._paired else batch  # a forward of its own takes them as they are
            if self._micro_batch is None:
                yield batch
            else:
                if self.sample is None or num_examples(self.sample) < 2:
                    count, most = next((n for n, _ in ways_to_cut(batch)), 0), _MOST_SAMPLED
                    chosen = [i * count // most for i in range(most)]
                    self.sample = take(batch, chosen, count, flattened=self._paired) if count > most else batch
                yield from _split(batch, self._micro_batch, flattened=self._paired)

    def _note_order(self, index: int, mark: Fingerprint) -> None:
        """Compare with the batches seen so far, of passes that were completed or not."""
        if index < len(self._order):
            self.shuffles = self.shuffles or mark.order != self._order[index]
            self.regroups = self.regroups or (self._totals is not None and mark.examples not in self._groups)
        else:
            self._order.append(mark.order)
            self._groups.add(mark.examples)


def _as_batches(data: Any, paired: bool, may_be_empty: bool) -> Iterable[Any]:
    if isinstance(data, (Tensor, np.ndarray, tuple, Mapping)):
        return [data]
    if isinstance(data, list):
        if paired and len(data) == 2 and all(isinstance(item, (Tensor, np.ndarray)) for item in data):
            return [data]
        if not data and not may_be_empty:
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


def _split(batch: Any, size: int, *, flattened: bool) -> Iterator[Any]:
    """Cut a batch along the first dimension of its tensors; tensors of another length are handed to every piece."""
    count = _count(batch)
    for rows in _pieces_of(count, size):
        yield take(batch, rows, count, flattened=flattened)


def _count(batch: Any) -> int:
    count = next((n for n, _ in ways_to_cut(batch) if n), 0)
    if count == 0:
        raise DataError(
            "micro_batch= cuts batches along the first dimension of their tensors, and this batch has none."
        )
    return count


def _pieces_of(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
