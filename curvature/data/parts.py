"""Parts of a batch: some of its examples, however the batch holds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.data.tensors import attributes_of, map_tensors, tensors_in

__all__ = ["num_examples", "small_part", "sparse_rows", "take", "ways_to_cut"]

_SHARE, _TOKENS = 8, 8  # of a small part: one in so many; the shortest sequences


def num_examples(batch: Any) -> int:
    """Return the length of the first tensor that has a dimension; 0 if there is none."""
    return next((len(t) for t in tensors_in(batch) if t.ndim > 0), 0)


def ways_to_cut(batch: Any) -> Iterator[tuple[int, Any]]:
    """Yield (N, what `take` is given) for each way in which a batch may hold N examples; the likeliest first."""
    if callable(getattr(batch, "to_data_list", None)) and callable(getattr(batch, "from_data_list", None)):
        yield len(batch.to_data_list()), batch
        return
    counts = [num_examples(batch)]
    if isinstance(batch, (list, tuple)) and not any(isinstance(item, Tensor) for item in batch):
        counts.append(len(batch))  # a list of examples
        counts += [len(item) for item in batch[:1] if isinstance(item, (list, tuple))]  # lists of their parts
    for count in dict.fromkeys(counts):
        yield count, batch


def take(batch: Any, rows: Sequence[int], count: int, *, flattened: bool = False) -> Any:
    """Return a batch of `count` examples with some of them only; what has another length is handed on whole.

    With `flattened` a tensor that is several times as long holds as many rows of each example, one after another.
    """
    if callable(getattr(batch, "from_data_list", None)):
        examples = batch.to_data_list()
        return batch.from_data_list([examples[i] for i in rows])
    return _taken(batch, rows, count, flattened)


def small_part(batch: Any, least: int = 1) -> Any | None:
    """Return an eighth of the examples, and of the length of sequences of tokens (N, T); None if neither can be cut.

    Targets of tokens may come in one row of N T. Of examples, or of all tokens, there are at least so many.
    """
    count = num_examples(batch)
    if count == 0:
        return None
    shape = next((t.shape for t in tensors_in(batch) if _are_tokens(t)), torch.Size())
    length = max(_TOKENS, shape[1] // _SHARE) if shape else 0
    size = max(1, count // _SHARE, min(count, -(-least // max(1, length))))
    few = take(batch, range(size), count) if size < count else batch

    def shortened(t: Tensor) -> Tensor:
        if shape and t.shape == (shape.numel(),) and shape[1] > 1:
            return t.view(shape)[:size, :length].flatten()
        return t[:, :length] if _are_tokens(t) else t

    part = map_tensors(few, shortened)
    sizes = [sum(t.numel() for t in tensors_in(of)) for of in (part, batch)]
    return part if sizes[0] < sizes[1] else None


def _are_tokens(t: Tensor) -> bool:
    return t.ndim == 2 and t.layout is torch.strided and not t.is_floating_point() and not t.is_complex()


def sparse_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a sparse tensor, which indexing does not give."""
    return t.to_sparse_coo().index_select(0, rows).to_sparse(layout=t.layout)


def _taken(value: Any, rows: Sequence[int], count: int, flattened: bool) -> Any:
    if isinstance(value, Tensor):
        strided = value.layout is torch.strided
        if value.ndim == 0 or len(value) != count:
            if not flattened or not strided or value.ndim == 0 or len(value) % count:
                return value
            return value.unflatten(0, (count, -1))[_index(rows, value)].flatten(0, 1)
        return value[_index(rows, value)] if strided else sparse_rows(value, torch.tensor(rows, device=value.device))
    if isinstance(value, Mapping):
        mapped = {key: _taken(part, rows, count, flattened) for key, part in value.items()}
        return mapped if type(value) is dict else type(value)(mapped)  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        whole = len(value) != count or any(isinstance(t, Tensor) and t.ndim > 0 and len(t) == count for t in value)
        items = [_taken(part, rows, count, flattened) for part in value] if whole else [value[i] for i in rows]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return value[list(rows)] if value.shape and value.shape[0] == count else value
    if not tensors_in(value):
        return value
    changed = copy.copy(value)
    for name, part in attributes_of(value).items():
        object.__setattr__(changed, name, _taken(part, rows, count, flattened))
    return changed


def _index(rows: Sequence[int], like: Tensor) -> Any:
    if isinstance(rows, range) and rows.step == 1:
        return slice(rows.start, rows.stop)
    return torch.tensor(list(rows), device=like.device)
