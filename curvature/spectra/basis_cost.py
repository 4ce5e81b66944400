"""What the basis of a block Krylov space takes beside the products, from a piece of one that is timed."""

from __future__ import annotations

import torch

from curvature.environment.cost import timed
from curvature.linalg.base.places import Place

__all__ = ["DISK_SPEED", "block_seconds", "num_together"]

_READS = 4  # of the whole basis in a step: two to project on it and two to take away, as Gram-Schmidt goes twice
DISK_SPEED = 1.2e9
"""Bytes of a basis a second that come from a file, once a step."""
_SMALL = 1 << 28  # bytes read that take a tenth of a second and are not worth a timing
_ROWS, _COLUMNS = 16, 1 << 21  # of the piece
_TOGETHER, _TOGETHER_BYTES = 4, 1 << 31


def num_together(block_bytes: int) -> int:
    """Return how many groups of data have their products, of so many bytes each, projected at a time.

    A basis takes as long against four columns as against sixteen; but what is summed up takes memory.
    """
    return min(_TOGETHER, max(1, _TOGETHER_BYTES // block_bytes))


def block_seconds(
    n: int, dtype: torch.dtype, *, width: int, steps: float, singles: float, passes: int, place: Place
) -> float:
    """Return the seconds that a basis takes which grows by `width` vectors in each of so many steps.

    Args:
        n: length of a vector.
        dtype: of its entries.
        width: vectors a step, at least 1.
        steps: block steps.
        singles: single products against the full basis after them.
        passes: projections a step beside those, of the products of groups of the data.
        place: where it is held.
    """
    full = n * dtype.itemsize * width * steps
    by_block, by_one = full * steps / 2, full * singles  # bytes once; on average it is half full
    read = by_block * (_READS + passes) + by_one * _READS / width  # against a single vector it is as much faster
    if read < _SMALL:
        return 0.0
    rows = torch.ones(_ROWS, min(n, _COLUMNS), dtype=dtype, device="cpu" if place == "disk" else place)
    X = rows[:width].clone()
    _ = rows @ X.T
    _, seconds = timed(lambda: rows @ X.T, rows.device)
    return seconds / rows.nbytes * read + ((by_block + by_one) / DISK_SPEED if place == "disk" else 0.0)
