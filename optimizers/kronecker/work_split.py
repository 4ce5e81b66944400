"""Which rank works on which matrix, and how gradients and directions travel.

A matrix is the work of one rank: of those of its mesh where the parameter is in parts (a DTensor), else of those of the
optimizer's process group. Ranks take on the matrices in order of cost, each the one with least to do, which all of them
work out alike. Directions are broadcast, one message a rank and group of settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from curvature.objective.shards import is_part, mesh_group
from optimizers.shared.base import Group
from optimizers.shared.gradients import local

__all__ = ["WorkSplit", "add_whole", "whole_of"]


class WorkSplit:
    """The rank of each matrix.

    Args:
        units: of every group of settings, the matrices that one rank has to work on together.
        group: the optimizer's ranks, for parameters that are whole on each of them.
    """

    def __init__(self, units: Sequence[Sequence[Sequence[Any]]], group: Any) -> None:
        self.num_groups = len(units)
        self._ranks: dict[int, Any] = {}  # parameter -> the group of ranks that share it
        self._owner: dict[int, int] = {}  # parameter -> a rank of that group
        loads: dict[Any, list[float]] = {}
        for units_of_group in units:  # in turn: groups that are added later change nothing for earlier ones
            for unit in sorted(units_of_group, key=_cost, reverse=True):
                ranks = mesh_group(unit[0].device_mesh) if is_part(unit[0]) else group
                if ranks is None:
                    continue
                load = loads.setdefault(ranks, [0.0] * ranks.size())
                owner = load.index(min(load))
                load[owner] += _cost(unit)
                for p in unit:
                    self._ranks[id(p)], self._owner[id(p)] = ranks, owner

    def is_mine(self, p: Tensor) -> bool:
        """Whether a matrix is this rank's work."""
        ranks = self._ranks.get(id(p))
        return ranks is None or bool(ranks.rank() == self._owner[id(p)])

    def gathered(self, params: Sequence[Tensor], directions: dict[int, Tensor]) -> list[Tensor]:
        """Return the directions of some matrices, from whoever worked on them. All ranks call this together."""
        found = [directions.get(id(p)) for p in params]
        shared: dict[tuple[Any, int], list[int]] = {}
        for i, p in enumerate(params):
            if (ranks := self._ranks.get(id(p))) is not None:
                shared.setdefault((ranks, self._owner[id(p)]), []).append(i)
        for (ranks, owner), places in shared.items():
            blank = [torch.empty(params[i].shape, dtype=_wide(params[i]), device=params[i].device) for i in places]
            sent = [blank[k] if found[i] is None else found[i] for k, i in enumerate(places)]
            flat = _flatten_dense_tensors([t.contiguous() for t in sent if t is not None])
            dist.broadcast(flat, group=ranks, group_src=owner)
            for i, whole in zip(places, _unflatten_dense_tensors(flat, blank), strict=True):
                found[i] = whole
        return [d for d in found if d is not None]


def _cost(unit: Sequence[Any]) -> float:
    """Return the work on a unit in products and decompositions of its sides, up to a factor."""
    sides = [(p.shape[0], p.numel() / max(1, p.shape[0])) for p in unit if p.ndim > 0]
    return math.fsum(n**3 + m**3 + n * m * (n + m) for n, m in sides)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def whole_of(p: Tensor, maximize: bool) -> Tensor:
    """Return the whole gradient of a parameter, in float32 or wider, negative under maximize."""
    grad: Any = p.grad
    grad = grad.full_tensor() if is_part(grad) else grad
    grad = grad.to(_wide(p))
    return -grad if maximize else grad


def add_whole(params: Sequence[Tensor], directions: Sequence[Tensor], group: Group) -> None:
    """Move theta <- theta - lr (direction + weight_decay theta), each rank its part of those in parts.

    Low precision is rounded once: a small weight decay would be lost in a rounding of its own.
    """
    if not params:
        return
    own, steps = [local(p) for p in params], [_part_of(d, p) for d, p in zip(directions, params, strict=True)]
    if group["weight_decay"] != 0:
        steps = list(torch._foreach_add(steps, own, alpha=group["weight_decay"]))
    torch._foreach_add_(own, steps, alpha=-group["lr"])


def _part_of(whole: Tensor, p: Any) -> Tensor:
    """Return this rank's part of a tensor that is whole and alike on all ranks, placed as a parameter."""
    if not is_part(p):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    replicated = [Replicate()] * p.device_mesh.ndim
    placed = DTensor.from_local(whole, p.device_mesh, replicated, run_check=False)
    return placed.redistribute(placements=p.placements).to_local()
