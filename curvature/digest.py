"""Numbers that tell whether the contents of tensors have changed, for little more than one read of memory.

Version counters do not tell: fused optimizers, writes through `.data` and NumPy views bump none. Two numbers are taken
that fail differently, so that what escapes one is seen by the other:

- the sum of all words modulo 2^64: exact, sees a change of any one word by a single bit, NaN included; blind to
  permutations and to changes that cancel;
- inner products with fixed weights: see permutations and sign flips; blind below rounding, and in pieces that hold
  entries that are not finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from curvature.backward import no_autocast

__all__ = ["digest", "version"]

_LENGTH = 2**13  # weights; they stay in cache
_PIECE = 2**22  # entries that are widened at a time
_SMALL = 2**12  # entries; tensors up to this size are joined, which saves calls
_STRIPES = 64
_PLAIN = (Tensor, torch.nn.Parameter)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensors: Iterable[Tensor], *, most: int | None = None) -> tuple[int, ...]:
    """Return numbers that are equal for equal contents and differ where contents, their dtype or order differ.

    Args:
        tensors: of any dtype, layout and device.
        most: how many entries of a tensor are looked at, in evenly spread stripes. Default: all.
    """
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor in tensors:
        for part in (tensor.detach(),) if type(tensor) in _PLAIN and _is_plain(tensor) else _dense(tensor.detach()):
            if part.numel() and part.device.type != "meta":
                flat = part.flatten()
                if most is not None:  # all in one dtype, which saves calls
                    flat = (_striped(flat, most) if flat.numel() > most else flat).to(torch.float64)
                groups.setdefault((flat.device, flat.dtype), ([], []))[flat.numel() > _SMALL].append(flat)
    found: list[int] = []
    for (device, _), (small, large) in groups.items():
        with no_autocast(device):
            runs = [torch.cat(small) if len(small) > 1 else small[0], *large] if small else large
            found += torch.stack([total for run in runs for total in _sums_of_words(run)]).tolist()
            products = torch.stack([product for run in runs for product in _inner_products(run)])
            found += products.view(_WORDS[products.element_size()]).tolist()  # bits, so that NaN equals itself
    return tuple(found)


def version(tensor: Tensor) -> int:
    """Return the count of autograd's writes to a tensor; graphs that hold it refuse to run when it has moved."""
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.dtype in (torch.float32, torch.float64)
        and not (tensor.is_neg() or tensor.is_nested)
    )


def _dense(tensor: Tensor) -> Iterator[Tensor]:
    """Yield real strided tensors that hold all that a tensor does."""
    if hasattr(tensor, "to_local"):  # a shard
        tensor = tensor.to_local()
    if tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_quantized:
        yield tensor.int_repr()
    elif tensor.layout != torch.strided or tensor.is_nested:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            yield from (part.resolve_neg() for part in tensor.unbind()) if tensor.is_nested else (tensor.to_dense(),)
    elif tensor.is_complex():
        yield torch.view_as_real(tensor.resolve_conj())
    else:
        yield tensor.resolve_neg()


def _striped(flat: Tensor, most: int) -> Tensor:
    length = max(1, most // _STRIPES)
    gap = (flat.numel() - length) // (_STRIPES - 1)
    return flat.as_strided((_STRIPES, length), (gap, 1), flat.storage_offset()).flatten()


def _sums_of_words(flat: Tensor) -> Iterator[Tensor]:
    """Yield sums whose total is that of all words; wide words are summed fastest."""
    size = flat.element_size()
    words = flat.view(_WORDS[size]) if size in _WORDS else torch.view_as_real(flat).view(torch.int64)
    if size < 8:
        cut = flat.numel() * size // 8 * (8 // size) if flat.storage_offset() * size % 8 == 0 else 0
        if cut:
            yield words[:cut].view(torch.int64).sum()
        words = words[cut:]
    if words.numel():
        yield words.sum(dtype=torch.int64)


def _inner_products(flat: Tensor) -> Iterator[Tensor]:
    """Yield inner products with fixed weights; an entry's weight is that of its place in a row, times its row's."""
    wide = flat.dtype in (torch.float32, torch.float64)
    for piece in (flat,) if wide else flat.split(_PIECE):
        values = piece if wide else piece.to(torch.float64)
        weights = _weights(values.device, values.dtype)
        num_rows = values.numel() // _LENGTH
        if num_rows:
            rows = torch.mv(values[: num_rows * _LENGTH].view(num_rows, _LENGTH), weights)
            for part in (rows,) if num_rows <= _LENGTH else rows.split(_LENGTH):
                yield torch.dot(part, weights[: len(part)])
        if values.numel() % _LENGTH:
            yield torch.dot(values[num_rows * _LENGTH :], weights[: values.numel() % _LENGTH])


@lru_cache(maxsize=8)
def _weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    with torch.inference_mode(False):
        return (0.5 + torch.rand(_LENGTH, generator=generator, dtype=torch.float64)).to(device, dtype)
