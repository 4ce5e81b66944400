"""Fingerprints of batches: do two passes over a loader give the same examples, and in the same order?

A fingerprint is made of the bits of all tensors, arrays and numbers of a batch, in whole numbers modulo 2^64, which add
up exactly in any order. Each example has one number, for all of its parts together, so that inputs paired with other
targets are noticed; zeros at the end of an example, which padding adds, leave it as it is. Text counts only in batches
that hold nothing else.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Complex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvature.data.tensors import attributes_of
from curvature.errors import DataError

__all__ = ["Fingerprint", "fingerprint"]

_MASK = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of the generator SplitMix64
_TEXT, _NUMBERS = (str, bytes), (int, float, complex, Complex)
_CHUNK = 2**17  # entries that are worked on at a time


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
    rows, rest = _rows(leaves)
    order = _finish(int((rows * _coefficients(torch.arange(len(rows), device=rows.device), 0)).sum()) + rest)
    found = [int(rows.sum()) + rest & _MASK]
    found += [sum(_whole(item) for item in items) & _MASK for items in _listed(parts)]
    return Fingerprint((*found, *found[:1] * (3 - len(found))), order)


def _listed(batch: Any) -> Iterator[Sequence[Any]]:
    """Yield lists of examples: the batch as a list of them, and its parts as such lists."""
    if _is_list(batch) and batch and not any(isinstance(item, Tensor) for item in batch):
        yield batch
    parts = list(_children(batch))
    if len(parts) > 1 and all(_is_list(part) and len(part) == len(parts[0]) for part in parts):
        yield list(zip(*parts, strict=True))


def _whole(example: Any) -> int:
    rows, rest = _rows([leaf.unsqueeze(0) for leaf in _leaves(example)])
    return int(rows.sum()) + rest


def _rows(leaves: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return a number for each example, (N,), int64, and one for what has another length than the first tensor."""
    lengths = [leaf.shape[0] for leaf in leaves if leaf.ndim > 0]
    if not lengths:
        leaves, lengths = [leaf.unsqueeze(0) for leaf in leaves], [1] * len(leaves)
    if not lengths:
        return torch.zeros(0, dtype=torch.int64), 0
    rows, rest = None, 0
    for place, leaf in enumerate(leaves):
        if leaf.ndim > 0 and leaf.shape[0] == lengths[0]:
            found = _sums(leaf, place)
            rows = found if rows is None else rows + found.to(rows.device)
        else:
            rest += _finish(int(_sums(leaf.unsqueeze(0), place).sum()))
    assert rows is not None
    return _mixed(rows + _signed(_GOLDEN)), rest


def _sums(leaf: Tensor, place: int) -> Tensor:
    """Return for every row sum_j c_j m(x_j) modulo 2^64, x its bits in words of 8 bytes, m a mixing with m(0) = 0."""
    if leaf.layout is not torch.strided:
        return _sparse_sums(leaf, place)
    with torch.no_grad():
        words = _words(leaf.detach().reshape(leaf.shape[0], -1) if leaf.numel() else leaf.new_zeros(leaf.shape[0], 1))
        total = torch.zeros(len(words), dtype=torch.int64, device=words.device)
        width = max(1, _CHUNK // max(1, len(words)))
        for start in range(0, words.shape[1], width):
            part = words[:, start : start + width]
            at = torch.arange(start, start + part.shape[1], device=words.device)
            total += (_mixed(part) * _coefficients(at, place + 1)).sum(1)
    return total


def _sparse_sums(leaf: Tensor, place: int) -> Tensor:
    """Return the same for a sparse tensor, in numbers of its own."""
    entries = leaf.detach().to_sparse_coo().coalesce()
    row, *others = entries.indices()
    column = torch.zeros_like(row)
    for size, index in zip(leaf.shape[1:], others, strict=False):
        column = column * size + index
    terms = _coefficients(column, place + 1) * _sums(entries.values(), place)
    return torch.zeros(leaf.shape[0], dtype=torch.int64, device=row.device).index_add_(0, row, terms)


def _words(rows: Tensor) -> Tensor:
    """Return the bits of every row, (N, words), int64, with zeros at the end."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    if rows.is_quantized:
        rows = rows.int_repr()
    data = rows.resolve_neg().contiguous().view(torch.uint8)
    missing = -data.shape[1] % 8
    if missing:
        data = torch.cat([data, data.new_zeros(len(data), missing)], dim=1)
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _coefficients(at: Tensor, place: int) -> Tensor:
    """Return odd numbers that look random."""
    return _mixed(at * _signed(_GOLDEN) + _signed(_finish(place + 1))) | 1


def _mixed(x: Tensor) -> Tensor:
    """Apply the one-to-one mixing of SplitMix64."""
    x = (x ^ _right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _right(x, 27)) * _signed(_MIX_2)
    return x ^ _right(x, 31)


def _finish(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = (x ^ x >> 30) * _MIX_1 & _MASK
    x = (x ^ x >> 27) * _MIX_2 & _MASK
    return x ^ x >> 31


def _right(x: Tensor, by: int) -> Tensor:
    """Shift to the right, zeros coming in at the left."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


# -- what a batch holds -----------------------------------------------------------------------------------------------


def _leaves(value: Any) -> list[Tensor]:
    """Return what a batch holds as tensors: tensors and arrays, numbers and lists of numbers; text if that is all."""
    return list(_walk(value, False, {})) or list(_walk(value, True, {}))


def _walk(value: Any, text: bool, seen: dict[int, Any]) -> Iterator[Tensor]:
    leaf = _leaf(value, text)
    if leaf is not None:
        yield from leaf.unbind() if leaf.is_nested else (leaf,)
    elif id(value) not in seen:
        seen[id(value)] = value  # kept alive, for its id is the key
        for part in _children(value):
            yield from _walk(part, text, seen)


def _leaf(value: Any, text: bool) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcmM":
        wide = {"m": np.int64, "M": np.int64, "f": np.float64, "c": np.complex128}.get(value.dtype.kind)
        known = wide if wide is not None and value.dtype.itemsize >= 8 else value.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(value, dtype=known, order="C"))
    if text and isinstance(value, _TEXT):
        return torch.tensor(_text_number(value))
    if isinstance(value, _NUMBERS):
        return torch.tensor(_number(value))
    if _is_list(value) and value:
        if all(isinstance(item, _NUMBERS) for item in value):
            return torch.tensor([_number(item) for item in value])
        if text and all(isinstance(item, _TEXT) for item in value):
            return torch.tensor([_text_number(item) for item in value])
    return None


def _number(value: Any) -> int:
    if isinstance(value, int):
        return _signed(value & _MASK)
    real, imaginary = struct.unpack("<QQ", struct.pack("<dd", complex(value).real, complex(value).imag))
    return _signed(real ^ _finish(imaginary))


def _text_number(value: str | bytes) -> int:
    data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return zlib.crc32(data) << 30 | zlib.adler32(data) >> 2


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
