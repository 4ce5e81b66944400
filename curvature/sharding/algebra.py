"""Sums, norms and products of sharded tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.errors import InputError
from curvature.sharding.collectives import all_gather, refuse_apart
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor, all_reduce, part_of, rule

# -- sums and norms ---------------------------------------------------------------------------------------------------


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def _counted(x: Tensor, sharding: Layout, dim: int) -> Tensor:
    """Return a part with zeros where other ranks own the entries."""
    if sharding.owned is None:
        return x
    owned = sharding.owned.to(x.device)
    return torch.where(owned.view(-1, *(1 for _ in range(x.ndim - 1 - dim % x.ndim))), x, torch.zeros_like(x))


@rule("sum", "mean", "any", "all", "amax", "amin", "max", "min", "aminmax", "linalg_vector_norm")
def _reduction(func: Any, *args: Any, **kwargs: Any) -> Any:
    given = _arguments(func, args, kwargs)
    x: ShardedTensor = given["self"]
    dim, keepdim = given.get("dim"), bool(given.get("keepdim"))
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    dims = [d % x.ndim for d in dims] or list(range(x.ndim))
    if x.along not in dims:
        found = func(x.local, *args[1:], **kwargs)
        return ShardedTensor(found, x.sharding, x.along - (0 if keepdim else sum(d < x.along for d in dims)))
    name, group = func._schema.name.removeprefix("aten::"), x.sharding.group
    if name in ("amax", "amin", "max", "min", "aminmax"):
        return _extremes(func, name, x, args, kwargs, dims)
    if name == "mean":
        total = torch.ops.aten.sum.dim_IntList(x, dims, keepdim)
        return total / (x.numel() / max(1, total.numel()))
    found = func(_counted(x.local, x.sharding, x.along) if name != "all" else x.local, *args[1:], **kwargs)
    if name in ("any", "all"):
        op = dist.ReduceOp.MAX if name == "any" else dist.ReduceOp.MIN
        return all_reduce(found.int(), group, op).bool()
    if name == "sum":
        return all_reduce(found, group)
    order = given.get("ord", 2)
    if order == float("inf"):
        return all_reduce(found, group, dist.ReduceOp.MAX)
    if order != 2:
        raise InputError(f"norms of sharded tensors are those of order 2 and infinity, got {order}.")
    return all_reduce(found.double().square(), group).sqrt().to(found.dtype)


def _extremes(func: Any, name: str, x: ShardedTensor, args: Any, kwargs: Any, dims: list[int]) -> Any:
    """Reduce by one all-reduce of maxima: of the values, or their negatives, and of whether any is NaN."""
    if (name in ("max", "min") and len(args) + len(kwargs) > 1) or (name == "aminmax" and len(dims) < x.ndim):
        raise InputError(f"{name} along the sharded dimension of a tensor has no rule: use amax or amin.")
    local = x.local
    if local.shape[x.along] == 0:  # torch has no extreme of nothing
        shape = [1 if d == x.along else s for d, s in enumerate(local.shape)]
        local = local.new_full(shape, torch.inf if name in ("amin", "min") else -torch.inf)
        least = local.new_full((), torch.inf)
    else:
        least = local.amin() if name == "aminmax" else local
    found = (least, local.amax()) if name == "aminmax" else (func(local, *args[1:], **kwargs),)
    signs = [-1 if name in ("amin", "min") or (name == "aminmax" and i == 0) else 1 for i in range(len(found))]
    packed = torch.stack(
        [s * f.double().nan_to_num(torch.inf, torch.inf, -torch.inf) for s, f in zip(signs, found, strict=True)]
    )
    nans = torch.stack([f.isnan() for f in found]).to(packed)
    packed, nans = all_reduce(torch.stack([packed, nans]), x.sharding.group, dist.ReduceOp.MAX)
    values = [torch.where(n > 0, torch.nan, s * v).to(x.dtype) for s, v, n in zip(signs, packed, nans, strict=True)]
    return tuple(values) if name == "aminmax" else values[0]


# -- products ---------------------------------------------------------------------------------------------------------


def _factors(a: Tensor, b: Tensor) -> tuple[Layout, Tensor, Tensor, int | None]:
    """Return the layout and the local factors of a (..., m, p) @ b (..., p, q), and where the product is sharded."""
    ndim, sharded = a.ndim, [x for x in (a, b) if isinstance(x, ShardedTensor)]
    sharding = sharded[0].sharding
    along_a, along_b = (x.ndim - x.along if isinstance(x, ShardedTensor) else None for x in (a, b))
    if along_a == 1 or along_b == 2:  # the sum runs over the entries
        mine = part_of(a, sharding, 1), _counted(part_of(b, sharding, 2), sharding, ndim - 2)
        return sharding, *mine, None
    if along_a is not None and along_b is not None and (along_a < 3 or along_a != along_b):
        raise InputError("a product of sharded tensors would have a row and a column for each entry.")
    right = along_a or along_b or 0
    if right > 2:  # in a batch of products
        return sharding, part_of(a, sharding, right), part_of(b, sharding, right), ndim - right
    if not isinstance(a, ShardedTensor):
        return sharding, a, cast(ShardedTensor, b).local, ndim - 1
    return sharding, a.local, b, ndim - 2


@rule("mm", "bmm")
def _product(func: Any, a: Tensor, b: Tensor) -> Tensor:
    sharding, mine, other, dim = _factors(a, b)
    found = func(mine, other)
    return all_reduce(found, sharding.group) if dim is None else ShardedTensor(found, sharding, dim)


@rule("mv", "dot")
def _vector_product(func: Any, a: Tensor, x: Tensor) -> Tensor:
    found = _product(torch.ops.aten.mm.default, a[None] if a.ndim == 1 else a, x[:, None])
    return found[:, 0] if func._schema.name == "aten::mv" else found.squeeze()


@rule("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_")
def _added_product(func: Any, self: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    vector = b.ndim == 1
    sharding, mine, other, dim = _factors(a, b[:, None] if vector else b)
    other = other[:, 0] if vector else other
    in_place = func._schema.name.endswith("_")
    if dim is None:
        product = all_reduce(torch.matmul(mine, other), sharding.group)
        found = self * beta + product * alpha
        return self.copy_(found) if in_place else found
    found = func(part_of(self, sharding, 1 if vector else mine.ndim - dim), mine, other, beta=beta, alpha=alpha)
    return self if in_place else ShardedTensor(found, sharding, dim)


def products_and_squares(V: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Return V R, (p, m), and the squares of the rows of R, (p,), in float64 by one all-reduce; V (p, m, n), R (p, n).

    Args:
        V: rows in parts, or alike on every rank.
        R: rows in parts.
    """
    assert isinstance(R, ShardedTensor)
    rows = _counted(R.local, R.sharding, 1)
    products = part_of(V, R.sharding, 1) @ rows[:, :, None]
    squares = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).square()
    found = all_reduce(torch.cat([products[..., 0].double(), squares], dim=1), R.sharding.group)
    return found[:, :-1], found[:, -1]


@rule("linalg_qr", told=False)
def _qr(x: ShardedTensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Return Q, sharded, and R of a tall (n, k): of the parts, then of their Rs (Demmel et al., 2012)."""
    if x.ndim != 2 or x.along != 0 or mode == "complete":
        raise InputError("QR has a rule for (n, k) in parts of rows, not for complete bases: take x.whole() first.")
    sharding, group, k = x.sharding, x.sharding.group, x.shape[1]
    rows = _counted(x.local, sharding, 0)
    Q, R = torch.linalg.qr(torch.nn.functional.pad(rows, (0, 0, 0, max(0, k - len(rows)))))
    refuse_apart()
    outer, R = torch.linalg.qr(all_gather(R, group).view(-1, k))
    if mode == "r":
        return R.new_empty(0), R
    found = ShardedTensor((Q @ outer.view(group.size(), k, -1)[group.rank()])[: len(rows)], sharding, 0)
    if sharding.held_once:
        return found, R
    return ShardedTensor(sharding.part(found.whole(), 0), sharding, 0), R  # owners have the rows of all


@rule("_linalg_svd", told=False)
def _svd(x: ShardedTensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> Any:
    """Return U, sharded, the singular values and V' of a tall (n, k)."""
    if full_matrices:
        raise InputError("the SVD of a sharded tensor has no full matrices: pass full_matrices=False.")
    Q, R = torch.linalg.qr(x)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    return (Q @ U, S, Vh) if compute_uv else (R.new_empty(0), S, R.new_empty(0))


@rule("equal", told=False)
def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a == b).all())
