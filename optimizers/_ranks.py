"""Means over data-parallel ranks: gradients and curvature of the joined batch, with one collective a dtype.

Ranks hold equal shares of a batch, as `DistributedDataParallel` takes it. A parameter that only some ranks used counts
zero on the others; one that no rank used stays without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = ["average_gradients", "average_over_ranks"]


def average_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Return the means of tensors over the ranks of a group, alike on every rank."""
    means: list[Tensor] = list(tensors)
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        here = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
        dtype = torch.promote_types(kind[0], torch.float32)
        flat = _flatten_dense_tensors([tensors[i] for i in here]).to(dtype)
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for i, mean in zip(here, _unflatten_dense_tensors(flat.to(kind[0]), [tensors[i] for i in here]), strict=True):
            means[i] = mean
    return means


def average_gradients(params: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace every `.grad` by its mean over the ranks of a group.

    Waits for the device only on ranks that did not use some parameter, which must learn whether others did.
    """
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    local = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    *means, shares = average_over_ranks([*local, used], group)
    anywhere = [True] * len(params) if all(p.grad is not None for p in params) else (shares > 0).tolist()
    for p, mean, is_used in zip(params, means, anywhere, strict=True):
        if is_used:
            p.grad = mean if p.grad is None else p.grad.copy_(mean)
