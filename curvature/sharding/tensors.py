"""Vectors, and blocks of them, of which each rank of a group holds a part: the algebra of `curvature.linalg` on them.

A `ShardedTensor` has the shape of the whole; along one dimension a rank holds its entries only. What is computed entry
by entry is computed on the parts; sums, products and norms along that dimension are all-reduced, and come as ordinary
tensors that are alike on every rank. An ordinary tensor beside it is taken for a whole, alike on every rank. Whatever
has no rule here raises an error: nothing is computed of a part as if it were the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from curvature.errors import InputError
from curvature.sharding.collectives import all_reduce as _all_reduce
from curvature.sharding.collectives import refuse_apart
from curvature.sharding.layout import Layout

__all__ = ["RULES", "ShardedTensor", "all_reduce", "held", "in_parts", "part_of", "rule", "whole"]

_Rule = TypeVar("_Rule", bound=Callable[..., Any])

RULES: dict[str, Callable[..., Any]] = {}
"""Operation of torch -> (it, its arguments) -> its result; `algebra` and `views` write theirs here."""


def rule(*names: str, told: bool = True) -> Callable[[_Rule], _Rule]:
    """Register a function as the rule of some operations; without `told` it is not told which one it serves."""

    def registered(function: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(names, function if told else lambda _, *args, **kwargs: function(*args, **kwargs)))
        return function

    return registered


class ShardedTensor(Tensor):
    """A tensor whose dimension `along` runs over a vector that lies over a group of ranks as `sharding` says.

    Attributes:
        local: this rank's part.
        sharding: who holds what.
        along: the dimension that is held in parts.
    """

    local: Tensor
    sharding: Layout
    along: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # as torch says to

    @staticmethod
    def __new__(cls, local: Tensor, sharding: Layout, along: int = -1) -> ShardedTensor:
        along %= local.ndim
        size = list(local.shape)
        size[along] = sharding.num_entries
        strides, step = [1] * local.ndim, 1
        for d in sorted(range(local.ndim), key=lambda d: (local.stride(d), -d)):
            strides[d], step = step, step * max(1, size[d])
        make: Any = Tensor._make_wrapper_subclass
        made: ShardedTensor = make(cls, size, strides, dtype=local.dtype, device=local.device)
        made.local, made.sharding, made.along = local.detach(), sharding, along
        return made

    def whole(self) -> Tensor:
        """Return the whole as an ordinary tensor, alike on every rank."""
        refuse_apart()
        rows = self.local.movedim(self.along, -1)
        found = self.sharding.whole(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]))  # which may be 0
        return found.view(*rows.shape[:-1], -1).movedim(-1, self.along)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # of torch, which passes what is of no use here
        mine = f"of which this rank holds {self.local.shape[self.along]} of {self.shape[self.along]}"
        return f"ShardedTensor({tuple(self.shape)}, {self.dtype}, {mine}; .local has them, .whole() gathers all)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a sharded tensor cannot be copied or pickled: save x.whole(), or x.local on each rank.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override] # mistyped
        name = func._schema.name.removeprefix("aten::")
        found = RULES.get(name, _entrywise if torch.Tag.pointwise in func.tags else None)
        if found is not None:
            return found(func, *args, **(kwargs or {}))
        if (made_of_others := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
            return made_of_others
        raise InputError(
            f"{name} is not known for sharded tensors, of which each rank holds a part: use what linear algebra needs "
            "(sums, products, norms), or x.whole() first, an ordinary tensor of all entries."
        )


def whole(x: Tensor) -> Tensor:
    """Return a tensor as an ordinary one, alike on every rank."""
    return x.whole() if isinstance(x, ShardedTensor) else x


def in_parts(x: Tensor, sharding: Layout | None, along: int = -1) -> Tensor:
    """Return what `whole` undoes: a tensor that is alike on every rank as a sharded one, where there is a layout."""
    return x if sharding is None else ShardedTensor(sharding.part(x, along), sharding, along)


def held(x: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, as an ordinary one: its part of a sharded one, else all of it."""
    return x.local if isinstance(x, ShardedTensor) else x


def all_reduce(x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum over ranks of what they have computed of their parts, or another reduction."""
    refuse_apart()
    return _all_reduce(x, group, op)


# -- entry by entry ---------------------------------------------------------------------------------------------------


def part_of(x: Tensor, sharding: Layout, right: int) -> Tensor:
    """Return the part of a tensor whose dimension `right` from the right runs over the vector, or is broadcast."""
    if isinstance(x, ShardedTensor):
        if x.sharding is not sharding or x.ndim - x.along != right:
            raise InputError(f"sharded tensors must be parts of one vector along one dimension, got {x!r}.")
        return x.local
    if x.ndim < right or x.shape[-right] == 1:
        return x
    if x.shape[-right] != sharding.num_entries:
        raise InputError(
            f"a tensor of shape {tuple(x.shape)} does not go with a sharded one of {sharding.num_entries} entries."
        )
    return sharding.part(x, -right)


@rule("copy_", "_to_copy", "clone", "detach", "alias", "zero_", "fill_")
@rule("zeros_like", "empty_like", "ones_like", "full_like")
def _entrywise(func: Any, *args: Any, **kwargs: Any) -> Any:
    first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, ShardedTensor))
    sharding, right = first.sharding, first.ndim - first.along
    target = kwargs.get("out", args[0] if func._schema.name.endswith("_") else None)
    if target is not None and not isinstance(target, ShardedTensor):
        raise InputError("an ordinary tensor cannot be overwritten by a sharded one: take x.whole() first.")

    def local(x: Any) -> Any:
        return part_of(x, sharding, right) if isinstance(x, Tensor) else x

    found = func(*tree_map(local, args), **tree_map(local, kwargs))
    if target is not None:
        return target
    return ShardedTensor(found, sharding, found.ndim - right)
