"""What to know of a `DataLoader`: the time its workers take to start, examples that it leaves out or repeats."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from curvature.errors import DataError

__all__ = ["loader_notes", "refuse_repeats", "timed"]

_T = TypeVar("_T")

_WORTH_SAYING, _WORTH_WARNING = 1.0, 10.0  # seconds

_waits: weakref.WeakKeyDictionary[Any, list[float]] = weakref.WeakKeyDictionary()
"""Of each loader that starts workers anew, how long each pass waited for its first batch."""
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def timed(data: Any, batches: Iterable[_T]) -> Iterator[_T]:
    """Yield batches of a loader, and remember how long the first one took where it starts its workers anew.

    Warns once where that adds up: not all that walks over the data returns notes.
    """
    if not (isinstance(data, DataLoader) and data.num_workers > 0 and not data.persistent_workers):
        yield from batches
        return
    begun, first = time.perf_counter(), True
    for batch in batches:
        if first:
            waits, first = _waits.setdefault(data, []), False
            waits.append(time.perf_counter() - begun)
            if len(waits) > 1 and sum(waits) >= _WORTH_WARNING and data not in _warned:
                _warned.add(data)
                warnings.warn(_of_starts(data, waits), UserWarning, stacklevel=2)
        yield batch


def loader_notes(data: Any) -> list[str]:
    """Say what a loader has cost that need not be, and where its examples are not those of its data set, once each."""
    if not isinstance(data, DataLoader):
        return []
    notes, waits = [], _waits.get(data, [])
    if len(waits) > 1 and sum(waits) >= _WORTH_SAYING:
        notes.append(_of_starts(data, waits))
    sampler = data.sampler
    if data.drop_last and not isinstance(data.dataset, IterableDataset) and data.batch_size is not None:
        count = len(sampler)  # type: ignore[arg-type] # of a map-style data set
        if rest := count % data.batch_size:
            notes.append(f"The loader leaves out {rest} of {count} examples: drop_last=True.")
    if isinstance(sampler, DistributedSampler):
        size, total = len(sampler.dataset), sampler.total_size  # type: ignore[arg-type] # it asks for it, too
        if total > size:
            notes.append(
                f"DistributedSampler repeats {total - size} of {size} examples, so that all ranks have as many: they "
                "count twice. Give each rank a list of its own batches; they may differ in number."
            )
        elif total < size:
            notes.append(f"DistributedSampler leaves out {size - total} of {size} examples: drop_last=True.")
    return notes


def _of_starts(data: Any, waits: Sequence[float]) -> str:
    return (
        f"The loader starts its {data.num_workers} worker{'s' if data.num_workers > 1 else ''} anew for each pass: "
        f"{sum(waits):.1f} s in {len(waits)} passes went by before the first batch. Pass list(loader), which holds the "
        "batches in memory, or make it with persistent_workers=True."
    )


def refuse_repeats(data: Any, order: Sequence[Hashable]) -> None:
    """Refuse a stream that each worker yields whole, from the fingerprints of its batches in one pass.

    Raises:
        DataError: with the remedy.
    """
    if not (isinstance(data, DataLoader) and data.num_workers > 1 and isinstance(data.dataset, IterableDataset)):
        return
    if order and all(count % data.num_workers == 0 for count in Counter(order).values()):
        raise DataError(
            f"each of the loader's {data.num_workers} workers yields the whole IterableDataset, so that every example "
            f"counts {data.num_workers} times: sums are as much too large, and errors over the data too small. Have "
            "its __iter__ yield a worker's part, as torch.utils.data.get_worker_info() says, or take num_workers=0."
        )
