"""Fingerprints of batches: do two passes over a loader give the same examples, and in the same order?

Each example has one number, for all of its parts together, so that inputs paired with other targets are noticed: the
digest of its bytes, less zeros at the end of each part, which padding adds. Numbers of examples are added up. Text
counts only in batches that hold nothing else.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Complex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvature.data.tensors import attributes_of
from curvature.errors import DataError

__all__ = ["Fingerprint", "fingerprint"]

_TEXT, _NUMBERS = (str, bytes), (int, float, complex, Complex)


@dataclass(frozen=True)
class Fingerprint:
    """What a batch holds, as numbers below 2^64."""

    examples: tuple[int, ...]
    """Sums over examples, blind to their order; one for each way to tell what the batch's examples are."""
    order: int
    """A number that depends on the order of the examples, too."""


def fingerprint(batch: Any) -> Fingerprint:
    """Return the fingerprint of a batch.

    Raises:
        DataError: if the batch holds nothing that can be seen.
    """
    parts = batch.to_data_list() if callable(getattr(batch, "to_data_list", None)) else batch
    leaves = _leaves(parts)
    if not leaves:
        raise DataError(
            f"batches of type {type(batch).__name__} hold no tensors, arrays, numbers or text that can be seen, so "
            "nobody can tell whether the loader gives the same data at each pass; pass list(loader), or yield "
            "tuples, mappings or dataclasses of tensors."
        )
    rows = _examples(leaves)
    found = [sum(rows) % 2**64]
    found += [sum(sum(_examples(_leaves(item), whole=True)) for item in items) % 2**64 for items in _listed(parts)]
    order = _number(struct.pack("<Q", row) for row in rows)
    return Fingerprint((*found, *found[:1] * (3 - len(found))), order)


def _listed(batch: Any) -> Iterator[Sequence[Any]]:
    """Yield lists of examples: the batch as a list of them, and its parts as such lists."""
    if _is_list(batch) and batch and not any(isinstance(item, Tensor) for item in batch):
        yield batch
    parts = list(_children(batch))
    if len(parts) > 1 and all(_is_list(part) and len(part) == len(parts[0]) for part in parts):
        yield list(zip(*parts, strict=True))


def _number(pieces: Iterable[bytes]) -> int:
    digest = blake2b(digest_size=8)
    for piece in pieces:
        digest.update(struct.pack("<Q", len(piece)))
        digest.update(piece)
    return int.from_bytes(digest.digest(), "little")


_Leaf = Tensor | bytes | list[bytes]  # one value, or one for each example


def _examples(leaves: Sequence[_Leaf], *, whole: bool = False) -> list[int]:
    """Return a number for each example, and one for each part of another length than the first with a dimension."""
    lengths = [len(leaf) for leaf in leaves if not _is_single(leaf)]
    if whole or not lengths:
        return [_number(b"".join(_rows(leaf, True)) for leaf in leaves)]
    columns, rest = [], []
    for place, leaf in enumerate(leaves):
        if _is_single(leaf) or len(leaf) != lengths[0]:
            rest.append(_number([struct.pack("<Q", place), *_rows(leaf, True)]))
        else:
            columns.append(_rows(leaf, False))
    return [*map(_number, zip(*columns, strict=True)), *rest]


def _is_single(leaf: _Leaf) -> bool:
    return leaf.ndim == 0 if isinstance(leaf, Tensor) else isinstance(leaf, bytes)


def _rows(leaf: _Leaf, whole: bool) -> list[bytes]:
    """Return the bytes of the examples, zeros at the end left out, or of all in one piece."""
    if not isinstance(leaf, Tensor):
        return [leaf] if isinstance(leaf, bytes) else leaf
    t = leaf.detach()
    if t.layout is not torch.strided:
        return _sparse_rows(t[None] if t.ndim == 0 else t)
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.is_quantized:
        t = t.int_repr()
    t = t.resolve_neg().cpu()
    if whole or t.ndim == 0:
        t = t[None]
    data = t.reshape(len(t), -1) if t.numel() else t.new_zeros(len(t), 1)
    return [row.tobytes().rstrip(b"\0") for row in data.contiguous().view(torch.uint8).numpy()]


def _sparse_rows(t: Tensor) -> list[bytes]:
    entries = t.to_sparse_coo().coalesce().cpu()
    index, values = entries.indices(), entries.values()
    bounds = torch.searchsorted(index[0].contiguous(), torch.arange(len(t) + 1)).tolist()
    columns = index[1:].T.contiguous().numpy()
    return [columns[a:b].tobytes() + b"".join(_rows(values[a:b], True)) for a, b in itertools.pairwise(bounds)]


# -- what a batch holds -----------------------------------------------------------------------------------------------


def _leaves(value: Any) -> list[_Leaf]:
    """Return what a batch holds: tensors and arrays, numbers and lists of numbers; text if that is all."""
    return list(_walk(value, False, {})) or list(_walk(value, True, {}))


def _walk(value: Any, text: bool, seen: dict[int, Any]) -> Iterator[_Leaf]:
    leaf = _leaf(value, text)
    if leaf is not None:
        yield from leaf.unbind() if isinstance(leaf, Tensor) and leaf.is_nested else (leaf,)
    elif id(value) not in seen:
        seen[id(value)] = value  # kept alive, for its id is the key
        for part in _children(value):
            yield from _walk(part, text, seen)


def _leaf(value: Any, text: bool) -> _Leaf | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcmM":
        plain = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        if plain.ndim == 0:
            return plain.tobytes()
        return torch.from_numpy(plain.reshape(-1).view(np.uint8).reshape(*plain.shape, plain.itemsize))
    kinds = (*_NUMBERS, *_TEXT) if text else _NUMBERS
    if isinstance(value, kinds):
        return _plain(value)
    if _is_list(value) and value and all(isinstance(item, kinds) for item in value):
        return [_plain(item) for item in value]
    return None


def _plain(value: Any) -> bytes:
    return value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray):
        yield from value.tolist() if value.dtype.kind in "OUS" else ()
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    else:
        yield from attributes_of(value).values()
