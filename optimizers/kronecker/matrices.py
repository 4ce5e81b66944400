"""Parameters as matrices, whole or in blocks, and which sides of them get a factor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optimizers.shared.base import Group

__all__ = ["Block", "as_matrix", "blocks_of", "refusal"]


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


def _cut(size: int, limit: int) -> list[slice]:
    parts = -(-size // limit)
    ends = [size * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
