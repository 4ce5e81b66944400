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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from curvature.autograd.backward import no_autocast
from curvature.environment.device import is_gpu

__all__ = ["WORDS", "digest", "groups", "is_view", "numbers", "stripes", "version"]

_LENGTH = 2**13  # weights; they stay in cache
_PIECE = 2**22  # entries that are widened at a time
_SMALL, _SMALL_ON_GPU = 2**12, 2**23  # entries; tensors up to this size are joined, which saves calls ...
_JOINED = 2**25  # ... but for more than so many entries
_STRIPES = 64
_PLAIN = (Tensor, torch.nn.Parameter)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensors: Iterable[Tensor], *, most: int | None = None) -> tuple[int, ...]:
    """Return numbers that are equal for equal contents and differ where contents, their dtype or order differ.

    Args:
        tensors: of any dtype, layout and device.
        most: how many entries of a tensor are looked at, in evenly spread stripes. Default: all.
    """
    return numbers(groups(tensors, most))


@dataclass(frozen=True)
class Group:
    """Flat tensors of one device and dtype: small ones, to be joined, and how larger ones are read."""

    device: torch.device
    small: list[list[Tensor]]
    large: list[_Run]

    def add(self, flat: Tensor) -> None:
        """Take in a tensor."""
        if flat.numel() > (_SMALL_ON_GPU if is_gpu(self.device) else _SMALL):
            self.large.append(_Run.of(flat))
        else:
            self.join(flat)

    def join(self, part: Tensor) -> None:
        """Take in a tensor beside the small ones."""
        if not self.small or sum(map(Tensor.numel, self.small[-1])) + part.numel() > _JOINED:
            self.small.append([])
        self.small[-1].append(part)

    def runs(self) -> Iterator[_Run]:
        """Yield what is read, one after another: those that are joined take memory."""
        for parts in self.small:
            yield _Run.of(_joined(parts))
        yield from self.large


@dataclass(frozen=True)
class _Run:
    """The views through which one flat tensor is read."""

    words: list[Tensor]
    rows: list[tuple[Tensor, list[Tensor]]]
    """Pieces in rows of `_LENGTH` entries, and the weights of the rows, a few thousand at a time."""
    rest: list[tuple[Tensor, Tensor]]
    """What fills no row, and its weights."""

    @classmethod
    def of(cls, flat: Tensor) -> _Run:
        run = cls(list(_words(flat)), [], [])
        wide = _wide(flat.dtype)
        weights = _weights(flat.device, wide)
        for piece in (flat,) if wide == flat.dtype else flat.split(_JOINED if is_gpu(flat.device) else _PIECE):
            num_rows, rest = divmod(piece.numel(), _LENGTH)
            if num_rows:
                of_rows = [weights[: min(_LENGTH, num_rows - i)] for i in range(0, num_rows, _LENGTH)]
                run.rows.append((piece[: num_rows * _LENGTH].view(num_rows, _LENGTH), of_rows))
            if rest:
                run.rest.append((piece[num_rows * _LENGTH :], weights[:rest]))
        return run

    def sums(self) -> Iterator[Tensor]:
        """Yield sums whose total is that of all words."""
        return (words.sum(dtype=torch.int64) for words in self.words)

    def inner_products(self) -> Iterator[Tensor]:
        """Yield inner products with fixed weights; an entry's weight is that of its place in a row, times its row's."""
        for rows, weights in self.rows:
            wide = _weights(rows.device, _wide(rows.dtype))
            products = torch.mv(rows.to(wide.dtype), wide)
            for part, of_rows in zip(products.split(_LENGTH), weights, strict=True):
                yield torch.dot(part, of_rows)
        for rest, of_rest in self.rest:
            yield torch.dot(rest.to(of_rest.dtype), of_rest)


def groups(tensors: Iterable[Tensor], most: int | None) -> list[Group]:
    """Return how tensors are read, by device and dtype; with `most`, stripes of them, all to be widened to one dtype.

    What is returned serves as long as the tensors lie where they do, if `is_view` says so of each.
    """
    found: dict[tuple[torch.device, torch.dtype | None], Group] = {}
    for tensor in tensors:
        for part in (tensor.detach(),) if is_view(tensor) else _dense(tensor.detach()):
            if part.numel() and part.device.type != "meta":
                flat = part.flatten().contiguous()  # a column is a flat view already, of entries apart from one another
                group = found.setdefault(
                    (flat.device, flat.dtype if most is None else None), Group(flat.device, [], [])
                )
                if most is None:
                    group.add(flat)
                else:
                    group.join(_striped(flat, most) if flat.numel() > most else flat)
    return list(found.values())


@torch.no_grad()
def numbers(read: Iterable[Group]) -> tuple[int, ...]:
    """Return the digest of what is read."""
    found: list[int] = []
    for group in read:
        with no_autocast(group.device):
            read_off = [(list(run.sums()), list(run.inner_products())) for run in group.runs()]
            totals = torch.stack([total for sums, _ in read_off for total in sums])
            products = torch.stack([product for _, inner in read_off for product in inner])
            bits = products.view(WORDS[products.element_size()])  # so that NaN equals itself
            found += torch.cat([totals, bits.long()]).tolist()  # a GPU is waited for once
    return tuple(found)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which entries are multiplied, which holds them exactly but for the largest integers."""
    return torch.float32 if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the entries of all parts; in float64 where there are stripes or several dtypes."""
    if any(part.ndim > 1 for part in parts) or len({part.dtype for part in parts}) > 1:
        parts = [part.flatten().to(torch.float64) for part in parts]
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def version(tensor: Tensor) -> int:
    """Return the count of autograd's writes to a tensor; graphs that hold it refuse to run when it has moved."""
    return 0 if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Say whether the entries are what lies in memory, in that order: a flat view of them holds all there is."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_complex() or tensor.is_quantized or tensor.is_neg())
        and tensor.is_contiguous()
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
    """Return a view of evenly spread stripes, (count, length)."""
    count, length, gap = stripes(flat.numel(), most)
    return flat.as_strided((count, length), (gap, 1), flat.storage_offset())


def stripes(size: int, most: int) -> tuple[int, int, int]:
    """Return count, length and distance of evenly spread stripes that hold about `most` of more entries."""
    length = max(1, most // _STRIPES)
    return _STRIPES, length, (size - length) // (_STRIPES - 1)


def _words(flat: Tensor) -> Iterator[Tensor]:
    """Yield views of all words as integers; wide words are summed fastest."""
    size = flat.element_size()
    words = flat.view(WORDS[size]) if size in WORDS else torch.view_as_real(flat).view(torch.int64)
    if size < 8:
        cut = flat.numel() * size // 8 * (8 // size) if flat.storage_offset() * size % 8 == 0 else 0
        if cut:
            yield words[:cut].view(torch.int64)
        words = words[cut:]
    if words.numel():
        yield words


@lru_cache(maxsize=8)
def _weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    with torch.inference_mode(False):
        return (0.5 + torch.rand(_LENGTH, generator=generator, dtype=torch.float64)).to(device, dtype)
