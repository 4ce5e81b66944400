"""Data-parallel sums: each rank holds its part of the data and all of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sum_over_ranks"]


def sum_over_ranks(total: Tensor, weight: float, group: ProcessGroup) -> tuple[Tensor, float]:
    """Return the sums of `total` and `weight` over the ranks of a group, alike on every rank. One collective."""
    packed = torch.cat([total.reshape(-1), total.new_tensor([weight])])
    if total.dtype == torch.float32:
        packed = packed.double()  # a count above 2^24 would be rounded in float32
        packed[-1] = weight
    dist.all_reduce(packed, group=group)
    return packed[:-1].view_as(total).to(total.dtype), float(packed[-1])
