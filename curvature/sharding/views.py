"""Other shapes of sharded tensors, parts of them, and new ones like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.sharding.tensors import ShardedTensor, part_of, rule

# -- views ------------------------------------------------------------------------------------------------------------


@rule("slice")
def _slice(
    func: Any, x: ShardedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    dim %= x.ndim
    if dim != x.along:
        return ShardedTensor(func(x.local, dim, start, end, step), x.sharding, x.along)
    first, stop, step = slice(start, end, step).indices(x.shape[dim])
    if step != 1:
        raise InputError("a sharded tensor has no every other entry: take x.whole() first.")
    part = x.sharding.sub(first, max(first, stop))
    if not part.shapes:
        raise InputError("a sharded tensor has no empty part: take x.whole() first.")
    offset = x.sharding.starts.index(first)
    begin = x.sharding.local_starts[x.sharding.rank][offset]
    return ShardedTensor(x.local.narrow(dim, begin, part.num_local), part, dim)


@rule("split", "split_with_sizes", told=False)
def _split(x: ShardedTensor, sizes: Any, dim: int = 0) -> list[Tensor]:
    n = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, n - a) for a in range(0, n, sizes)] if n else [0]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [torch.ops.aten.slice.Tensor(x, dim, e - s, e) for s, e in zip(sizes, ends, strict=True)]


@rule("select")
def _select(func: Any, x: ShardedTensor, dim: int, index: int) -> Tensor:
    dim %= x.ndim
    if dim == x.along:
        raise InputError("a single entry of a sharded vector is on one rank only: take x.whole() first.")
    return ShardedTensor(func(x.local, dim, index), x.sharding, x.along - (dim < x.along))


@rule("unbind", told=False)
def _unbind(x: ShardedTensor, dim: int = 0) -> list[Tensor]:
    return [torch.ops.aten.select.int(x, dim, i) for i in range(x.shape[dim])]


@rule("t", "transpose", "permute")
def _permuted(func: Any, x: ShardedTensor, *dims: Any) -> Tensor:
    name = func._schema.name.removeprefix("aten::")
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in dims[0]]
    else:
        a, b = dims if name == "transpose" else (0, x.ndim - 1)
        order[a], order[b] = order[b], order[a]
    return ShardedTensor(x.local.permute(order), x.sharding, order.index(x.along))


@rule("unsqueeze", told=False)
def _unsqueeze(x: ShardedTensor, dim: int) -> Tensor:
    dim %= x.ndim + 1
    return ShardedTensor(x.local.unsqueeze(dim), x.sharding, x.along + (dim <= x.along))


@rule("squeeze", told=False)
def _squeeze(x: ShardedTensor, dim: Any = None) -> Tensor:
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    gone = [d for d in dims if d != x.along and x.shape[d] == 1]
    return ShardedTensor(x.local.squeeze(tuple(gone)), x.sharding, x.along - sum(d < x.along for d in gone))


@rule("view", "_unsafe_view", told=False)
def _view(x: ShardedTensor, size: Sequence[int]) -> Tensor:
    shape = list(size)
    if -1 in shape:
        known = -torch.Size(shape).numel()
        shape[shape.index(-1)] = x.numel() // known if known else 0
    before = torch.Size(x.shape[: x.along]).numel()
    n = x.shape[x.along]
    places = [d for d, s in enumerate(shape) if s == n and torch.Size(shape[:d]).numel() == before]
    if not places or torch.Size(shape).numel() != x.numel():
        raise InputError(f"a view of {tuple(x.shape)} as {tuple(size)} would mix entries of a sharded dimension.")
    shape[places[-1]] = x.local.shape[x.along]
    try:
        found = x.local.view(shape)
    except RuntimeError:
        found = x.local.reshape(shape)
    return ShardedTensor(found, x.sharding, places[-1])


@rule("expand", told=False)
def _expand(x: ShardedTensor, size: Sequence[int], **_: Any) -> Tensor:
    along = x.along + len(size) - x.ndim
    shape = [x.local.shape[x.along] if d == along else s for d, s in enumerate(size)]
    return ShardedTensor(x.local.expand(shape), x.sharding, along)


@rule("index", "index_put_")
def _index(func: Any, x: Tensor, indices: Sequence[Tensor | None], *values: Any) -> Any:
    chosen = [d for d, index in enumerate(indices) if index is not None]
    index = indices[chosen[0]]
    one = len(chosen) == 1 and index is not None and index.ndim == 1
    if not isinstance(x, ShardedTensor) or isinstance(index, ShardedTensor) or not one or chosen[0] == x.along:
        raise InputError("sharded tensors are indexed by one list of places in a dimension that is not sharded.")
    if not values:
        return ShardedTensor(func(x.local, indices), x.sharding, x.along)
    mine = part_of(values[0], x.sharding, x.ndim - x.along)
    func(x.local, indices, mine, *values[1:])
    return x


@rule("cat", told=False)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = next(x for x in tensors if isinstance(x, ShardedTensor))
    dim, right = dim % first.ndim, first.ndim - first.along
    if dim != first.along:
        mine = [part_of(x, first.sharding, right) for x in tensors if x.ndim == first.ndim]
        return ShardedTensor(torch.cat(mine, dim), first.sharding, first.along)
    parts = [x for x in tensors if isinstance(x, ShardedTensor)]
    if len(parts) < len(tensors):
        raise InputError("ordinary tensors cannot be joined to a sharded one along the dimension that is sharded.")
    sharding = parts[0].sharding.joined([x.sharding for x in parts[1:]])
    return ShardedTensor(torch.cat([x.local for x in parts], dim), sharding, dim)


@rule("stack", told=False)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


@rule("constant_pad_nd")
def _pad(func: Any, x: ShardedTensor, pad: Sequence[int], value: float = 0) -> Tensor:
    right = x.ndim - x.along
    if any(pad[2 * right - 2 : 2 * right]):
        raise InputError("a sharded dimension cannot be padded.")
    return ShardedTensor(func(x.local, pad, value), x.sharding, x.along)


@rule("flip", "roll")
def _moved(func: Any, x: ShardedTensor, *args: Any) -> Tensor:
    dims = args[-1] if args and args[-1] else range(x.ndim)
    if x.along in [d % x.ndim for d in dims]:
        raise InputError("entries of a sharded dimension cannot change places: take x.whole() first.")
    return ShardedTensor(func(x.local, *args), x.sharding, x.along)


@rule("new_zeros", "new_empty", "new_ones", "new_full")
def _new(func: Any, x: ShardedTensor, size: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """Make a tensor like x, in parts along the dimension that is as long as the vector, if there is one."""
    places = [d for d, s in enumerate(size) if s == x.shape[x.along]]
    if len(places) > 1:
        raise InputError(f"which dimension of {tuple(size)} runs over {x.shape[x.along]} sharded entries is not clear.")
    if not places:
        return cast(Tensor, func(x.local, size, *args, **kwargs))
    shape = [x.local.shape[x.along] if d == places[0] else s for d, s in enumerate(size)]
    return ShardedTensor(func(x.local, shape, *args, **kwargs), x.sharding, places[0])
