"""Weighted sums over batches, one held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from curvature.engine.linearize import Linearization
from curvature.environment.lock import one_at_a_time

__all__ = ["parts_of", "sum_of_parts"]


def parts_of(
    walk: Iterable[Linearization],
    products: Callable[[Linearization], Tensor],
    observe: Callable[[int, float, Tensor], None] | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the weight and product of every batch; `observe` is told its place, too, where it counts."""
    for lin in walk:
        part = products(lin)
        weight = lin.weight
        if observe is not None and weight != 0:
            observe(lin.index, weight, part)
        del lin  # before the next graph is built
        yield weight, part
        del part


def sum_of_parts(parts: Iterable[tuple[float, Tensor]], own: bool = False) -> tuple[Tensor | None, float, float]:
    """Return (total, weight, unit): the sum of weight * part is total * unit; (None, 0, 1) if there is no part.

    `own` says that nobody else holds the first part, which may then become the sum.
    """
    total: Tensor | None = None
    weight, unit = 0.0, 1.0
    with one_at_a_time:
        for w, part in parts:
            weight += w
            if w == 0:  # a batch of ignored targets only: its mean is 0/0 and counts nothing
                part = torch.zeros_like(part)
            if total is None:  # a single batch, the common case, is not scaled up and down again
                total, unit = part, w if w != 0 else 1.0
            elif own:
                total.add_(part, alpha=w / unit)
            else:
                total, own = total.add(part, alpha=w / unit), True  # the first part may be somebody else's memory
            del part
    return total, weight, unit
