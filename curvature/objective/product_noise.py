"""How far products are from what a wider dtype makes of the same weights: float64, or float32 for what is narrower.

Rounding of a product is one fixed error of the matrix: repeating the product, or summing its examples in another order,
does not show it, for activations and gradients are rounded before. So it is measured against products in the wider
dtype: in float32 with some of a batch's examples, whose products err by as much as those of all or by more.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvature.autograd.backward import dtypes_of_graph
from curvature.data.parts import small_part
from curvature.data.tensors import map_tensors, tensors_in
from curvature.environment import autocast
from curvature.environment.cost import gibibytes
from curvature.objective.interface import ObjectiveLike
from curvature.objective.steady_draws import SteadyDraws

__all__ = ["ProductNoise", "noise_notes", "product_noise"]

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_HALF = {torch.bfloat16, torch.float16}
_UNKNOWN = {torch.bfloat16: 10.0, torch.float16: 10.0, torch.float32: 100.0}
"""Rounding errors that a product is taken to have where it could not be repeated."""
_LONG = 2**16  # vectors of which one tells as much as two
_EXAMPLES = 64  # at least, of a batch in float32: the errors of fewer are as large as their products are small ...
_NUMBERS = 2**18  # ... unless they hold more numbers than that, and graphs of them take memory
_VECTORS = 6  # as long as the parameters, in float64, that repeating a product takes ...
_MOST = 2**29  # ... and the bytes up to which a product in float32 is repeated


@dataclass(frozen=True)
class ProductNoise:
    """The error of products with one matrix, as measured on one batch."""

    value: float
    """|error of A z| / |A z| for a random z; the larger of two short ones."""
    dtype: torch.dtype
    """The narrowest that the model computes in."""
    what: str
    """Which matrix."""
    failure: str = ""
    """Why it was not measured, or not all of it; then `value` is a guess, or what was measured if that is more."""

    def note(self, count: int = 1) -> str:
        """Say so, for a reader of results: the largest of so many."""
        what = self.what if count == 1 else f"{self.what}, the largest error of {count} blocks"
        dtype, wider = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, _WIDER[self.dtype]))
        if self.failure:
            return (
                f"Products ({what}) are computed in {dtype} and could not be repeated in {wider} ({self.failure}): "
                f"their error is taken to be {self.value:.1e} of their size."
            )
        return (
            f"Products ({what}) are computed in {dtype} and err by {self.value:.1e} of their size, as measured "
            f"against {wider} on one batch."
        )


def product_noise(
    objective: ObjectiveLike, what: str, key: Hashable, size: int, product: Callable[[Any, Tensor], Tensor]
) -> float:
    """Return |error of A z| / |A z| for random z; 0 where the model computes in float64.

    Cost, once a point and matrix: a wider copy of the model, and products with one or two vectors, twice, of one batch
    (in float32 of an eighth of its examples, of small ones 64 at least); a loss before, if nothing was computed yet,
    which shows the dtypes. In float32 it is not measured for models in parts, and where copies take more than half a
    gigabyte.

    Args:
        objective: whose products are meant.
        what: names the matrix in notes.
        key: tells matrices apart.
        size: of vectors.
        product: (an objective of one batch, Z) -> A Z.
    """
    objective.freshness.current()
    if objective.ranks is None and "recorded" not in objective.freshness.measured():
        objective.loss()  # shows what the model computes in
    found = objective.freshness.measured()
    if (dtype := _narrowest(objective, found.get("recorded", set()))) is None:
        return 0.0
    if key not in found:
        noise = _measured(objective, size, product, dtype, what)
        if objective.ranks is not None:  # of which some may have no batch
            known = not math.isnan(noise.value)
            total, count = objective.ranks.mean(noise.value if known else 0.0, float(known))
            noise = replace(noise, value=total / count if count else 0.0)
        found[key] = noise
    value: float = found[key].value
    return value


def noise_notes(objective: ObjectiveLike) -> list[str]:
    """Return what was measured at the present point, in words: one note for the blocks of a matrix."""
    groups: dict[tuple[str, str, str], list[ProductNoise]] = {}
    for noise in objective.freshness.measured().values():
        if isinstance(noise, ProductNoise):
            name, of_block, _ = noise.what.partition(" of ")
            groups.setdefault((name, of_block, noise.failure), []).append(noise)
    return [max(group, key=lambda noise: noise.value).note(len(group)) for group in groups.values()]


def _narrowest(objective: ObjectiveLike, recorded: set[torch.dtype]) -> torch.dtype | None:
    """Return the narrowest dtype of parameters, autocast or a graph; None if it is float64."""
    dtypes = {t.dtype for t in objective.model.parameters()}
    dtypes |= {dtype for device, dtype in autocast.present() if device == objective.device.type}
    dtypes |= set() if objective.shards is None else objective.shards.dtypes()
    dtypes |= recorded if objective.ranks is None else set()  # all ranks are to agree, those without data, too
    return max(dtypes & _UNKNOWN.keys(), key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _measured(
    objective: ObjectiveLike, size: int, product: Callable[[Any, Tensor], Tensor], dtype: torch.dtype, what: str
) -> ProductNoise:
    unknown = _UNKNOWN[dtype] * torch.finfo(dtype).eps
    if objective.shards is not None:  # a copy would not be
        return ProductNoise(unknown, dtype, what, "the model is sharded")
    needed = _VECTORS * 8 * sum(p.numel() for p in objective.model.parameters())
    if dtype is torch.float32 and needed > _MOST:
        return ProductNoise(unknown, dtype, what, f"copies take {gibibytes(needed)}")
    kept = (batch for _, _, batch in objective.kept.batches())  # where a loader is not asked once more
    given = kept if len(objective.kept) else objective.batches()
    batch = next((batch for batch in given if objective.linearise(batch).weight != 0), None)
    if batch is None:
        return ProductNoise(math.nan, dtype, what)
    failure = ""
    part = small_part(batch, _least(batch)) if dtype is torch.float32 else None
    for some in (batch,) if part is None else (part, batch):  # a model may take batches of one size only
        try:
            error, failure = _error(objective, some, size, product, dtype)
        except Exception as refusal:  # a model may refuse to be copied or to run in another dtype in any way
            error, failure = math.nan, f"{type(refusal).__name__}: {str(refusal).partition(chr(10))[0]}"
        if not math.isnan(error):
            return ProductNoise(max(error, unknown) if failure else error, dtype, what, failure)
    return ProductNoise(unknown, dtype, what, failure or "they are not finite")


def _least(batch: Any) -> int:
    """Return of how many examples at least to take products."""
    numbers = next((t.numel() // len(t) for t in tensors_in(batch) if t.ndim > 0 and len(t) > 0), 1)
    return max(1, min(_EXAMPLES, _NUMBERS // max(1, numbers)))


def _error(
    objective: ObjectiveLike, batch: Any, size: int, product: Callable[[Any, Tensor], Tensor], dtype: torch.dtype
) -> tuple[float, str]:
    """Return the relative error of products of one batch, the largest, and why that may be too little."""
    columns = 2 if size < _LONG else 1
    Z = torch.randn(size, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own: dict[str, Any] = {"process_group": None, "keep_graphs": False}
    single = objective.replace(data=[batch], **own)
    with SteadyDraws() if _linearised(single).drew_random_numbers else contextlib.nullcontext():  # they go by the dtype
        rough = product(single, Z.to(objective.device, objective.dtype))
        del single
        with autocast.without():
            twin = _widened(objective, batch, _WIDER[dtype], own)
            if dtype in _HALF and _in_graph(twin) & _HALF:  # by autocast inside, which leaves float64 alone
                twin = _widened(objective, batch, torch.float64, own)
            narrow = {d for d in _in_graph(twin) if d.is_floating_point and d.itemsize <= dtype.itemsize}
            fine = product(twin, Z.to(objective.device, twin.dtype)).double()
    sizes = fine.norm(dim=0)
    error = float((fine.sub_(rough).norm(dim=0) / sizes).max()) if bool(sizes.any()) else 0.0
    return error, "the model casts to it by itself" if narrow else ""


def _linearised(objective: Any) -> Any:
    return objective.linearise(next(objective.batches()))


def _in_graph(objective: Any) -> set[torch.dtype]:
    return dtypes_of_graph([_linearised(objective).graph_root()])


def _widened(objective: ObjectiveLike, batch: Any, dtype: torch.dtype, own: dict[str, Any]) -> Any:
    """Return the objective of one batch on a copy of the model, with all that is narrower in `dtype`."""

    def wide(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.itemsize < dtype.itemsize else t

    loss = objective.settings["loss"]
    model, loss, params = copy.deepcopy((objective.model, loss, objective.space.tensors))
    held = set()
    for module in (model, loss):
        if isinstance(module, nn.Module):
            module._apply(wide)
            held |= set(map(id, module.parameters()))
    if not held >= set(map(id, params.values())):
        raise ValueError("parameters that no module holds have no copy")
    settings = {**objective.settings, **own, "loss": loss, "params": params, "data": [map_tensors(batch, wide)]}
    build: Any = type(objective)
    return build(model, **settings)
