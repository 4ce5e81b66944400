"""Parameters as matrices, whole or in blocks, which sides of them get a factor, and the sums of outer products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.environment.device import is_gpu
from curvature.errors import InputError
from optimizers.shared.base import Group

__all__ = ["Block", "add_to_factors", "as_matrix", "blocks_of", "by_blocks", "factor_state", "refusal", "refuse_decay"]

_SMALL, _SMALL_ON_GPU = 128, 512
"""Half of a side from which products with the own transpose are computed by halves."""
_PADDING = 16
"""Entries between rows that are transposed: of rows a power of two apart a cache holds few (six times as slow)."""


@dataclass(frozen=True)
class Block:
    """A block of a matrix.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        sides: those with a factor: "left" over the rows, "right" over the columns, with the number of the block.
    """

    rows: slice
    columns: slice
    sides: dict[str, str]

    def of(self, matrix: Tensor) -> Tensor:
        """Return the block of a matrix, as a view."""
        return matrix[self.rows, self.columns]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as rows x all the rest: for convolutions the output channels by the patch."""
    return tensor.reshape(tensor.shape[0], -1)


def refusal(shape: Sequence[int], group: Group) -> str | None:
    """Return why a parameter is no matrix for `max_dim` and `large`; None if it is."""
    if len(shape) < 2:
        return "a vector" if shape else "a scalar"
    rows, columns = shape[0], _product(shape[1:])
    if min(rows, columns) <= 1:
        return "empty" if min(rows, columns) == 0 else "a vector in effect"
    if group["large"] == "one-sided" and min(rows, columns) > group["max_dim"]:
        return f"both sides above max_dim = {group['max_dim']}"
    return None


def blocks_of(shape: Sequence[int], group: Group) -> list[Block]:
    """Return the blocks of a matrix.

    A side longer than `max_dim` has no factor (`large="one-sided"`), or is cut into parts as equal as they can be
    (`large="blocks"`).
    """
    rows, columns = shape[0], _product(shape[1:])
    limit, cuts = group["max_dim"], group["large"] == "blocks"
    sides = [name for name, size in (("left", rows), ("right", columns)) if cuts or size <= limit]
    found: list[Block] = []
    for r in _cut(rows, limit if cuts else rows):
        for c in _cut(columns, limit if cuts else columns):
            found.append(Block(r, c, {side: f"{side}.{len(found)}" for side in sides}))
    return found


def factor_state(p: Tensor, group: Group, averages: Sequence[str]) -> dict[str, Tensor]:
    """Return zero averages of the matrix's shape, and zero factors by name, in float32 or wider."""
    kind: dict[str, Any] = {"dtype": torch.promote_types(p.dtype, torch.float32), "device": p.device}
    shape = p.shape[0], _product(p.shape[1:])
    state = {name: torch.zeros(shape, **kind) for name in averages}
    for block in blocks_of(p.shape, group):
        sizes = {"left": block.rows.stop - block.rows.start, "right": block.columns.stop - block.columns.start}
        state |= {name: torch.zeros(sizes[side], sizes[side], **kind) for side, name in block.sides.items()}
    return state


def add_to_factors(
    g: Tensor, blocks: Sequence[Block], state: dict[str, Tensor], beta: float, share: float = -1
) -> None:
    """Let every factor be beta times itself plus a share, 1 - beta where none is given, of G G' or G' G."""
    share = 1 - beta if share < 0 else share
    for block in blocks:
        part = block.of(g)
        for side, name in block.sides.items():
            rows = part if side == "left" else part.T
            _add_square(state[name], rows, beta, share)


def _add_square(total: Tensor, rows: Tensor, beta: float, share: float) -> None:
    """Let a symmetric matrix be beta times itself plus a share of X X'; of large ones a part is computed once."""
    half = len(rows) // 2
    if half < (_SMALL_ON_GPU if is_gpu(total.device) else _SMALL):
        torch.addmm(total, rows, rows.T, beta=beta, alpha=share, out=total)
        return
    for part in (slice(None, half), slice(half, None)):
        _add_square(total[part, part], rows[part], beta, share)
    corner = total[:half, half:]
    torch.addmm(corner, rows[:half], rows[half:].T, beta=beta, alpha=share, out=corner)
    apart = corner.new_empty(half, corner.shape[1] + _PADDING)[:, : corner.shape[1]]
    total[half:, :half].copy_(apart.copy_(corner).T)


def by_blocks(function: Callable[[Block], Tensor], like: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Return a matrix put together from a function of its blocks."""
    if len(blocks) == 1:
        return function(blocks[0])
    whole = torch.empty_like(like)
    for block in blocks:
        block.of(whole).copy_(function(block))
    return whole


def refuse_decay(name: str, beta: Any) -> None:
    """Refuse a decay that is neither None nor in [0, 1)."""
    if beta is not None and not (isinstance(beta, (int, float)) and 0 <= beta < 1):
        raise InputError(f"{name} must be None or a number in [0, 1), got {beta!r}.")


def _cut(size: int, limit: int) -> list[slice]:
    parts = -(-size // limit)
    ends = [size * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
