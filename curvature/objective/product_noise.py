"""How far products in bfloat16, float16 or under autocast are from what float32 makes of the same weights.

Rounding of a product is one fixed error of the matrix: repeating the product, or summing its examples in another order,
does not show it, for the sums themselves are accumulated in float32. So it is measured against one product in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvature.autograd.backward import dtypes_of_graph
from curvature.data.tensors import map_tensors
from curvature.environment import autocast
from curvature.objective.interface import ObjectiveLike

__all__ = ["ProductNoise", "noise_notes", "product_noise"]

_NARROW = {torch.bfloat16, torch.float16}
_UNKNOWN = 10.0  # rounding errors that a product is taken to have where it could not be repeated in float32


@dataclass(frozen=True)
class ProductNoise:
    """The error of products with one matrix, as measured on one batch."""

    value: float
    """|error of A z| / |A z|, the larger of two random z."""
    dtype: torch.dtype
    """The narrowest that the model computes in."""
    what: str
    """Which matrix."""
    failure: str = ""
    """Why it could not be measured; then `value` is ten rounding errors of the dtype."""

    def note(self) -> str:
        """Say so, for a reader of results."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.failure:
            return (
                f"Products ({self.what}) are computed in {dtype} and could not be repeated in float32 "
                f"({self.failure}): their error is taken to be {self.value:.1e} of their size."
            )
        return (
            f"Products ({self.what}) are computed in {dtype} and err by {self.value:.1e} of their size, as measured "
            "against float32 on one batch."
        )


def product_noise(
    objective: ObjectiveLike, what: str, key: Hashable, size: int, product: Callable[[Any, Tensor], Tensor]
) -> float:
    """Return |error of A z| / |A z| for random z; 0 where the model computes in float32 or wider.

    Cost, once a point and matrix: a float32 copy of the model, and products of one batch with two vectors, twice; a
    loss before, if nothing was computed yet, which shows the dtypes.

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
    """Return what was measured at the present point, in words."""
    return [noise.note() for noise in objective.freshness.measured().values() if isinstance(noise, ProductNoise)]


def _narrowest(objective: ObjectiveLike, recorded: set[torch.dtype]) -> torch.dtype | None:
    """Return the narrowest dtype of parameters, autocast or a graph; None if it is float32 or wider."""
    dtypes = {t.dtype for t in objective.model.parameters()}
    dtypes |= {dtype for device, dtype in autocast.present() if device == objective.device.type}
    dtypes |= set() if objective.shards is None else objective.shards.dtypes()
    dtypes |= recorded if objective.ranks is None else set()  # all ranks are to agree, those without data, too
    return max(filter(_is_narrow, dtypes), key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def _measured(
    objective: ObjectiveLike, size: int, product: Callable[[Any, Tensor], Tensor], dtype: torch.dtype, what: str
) -> ProductNoise:
    if objective.shards is not None:  # a copy would not be
        return ProductNoise(_UNKNOWN * torch.finfo(dtype).eps, dtype, what, "the model is sharded")
    batch = next((batch for batch in objective.batches() if objective.linearise(batch).weight != 0), None)
    if batch is None:
        return ProductNoise(math.nan, dtype, what)
    Z = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(objective.device)
    own: dict[str, Any] = {"process_group": None, "keep_graphs": False}
    try:
        rough = product(objective.replace(data=[batch], **own), Z.to(objective.dtype)).double()
        with autocast.without():
            twin = _widened(objective, batch, torch.float32, own)
            if _in_graph(twin) & _NARROW:  # by autocast inside, which leaves float64 alone
                twin = _widened(objective, batch, torch.float64, own)
            fine = product(twin, Z.to(twin.dtype)).double() if not _in_graph(twin) & _NARROW else None
        failure = "" if fine is not None else "the model casts to it by itself"
    except Exception as error:  # a model may refuse to be copied or to run in another dtype in any way
        fine, failure = None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fine is None:
        return ProductNoise(_UNKNOWN * torch.finfo(dtype).eps, dtype, what, failure)
    errors = (rough - fine).norm(dim=0) / fine.norm(dim=0)
    return ProductNoise(float(errors.max()) if bool(fine.any()) else 0.0, dtype, what)


def _in_graph(objective: Any) -> set[torch.dtype]:
    return dtypes_of_graph([objective.linearise(next(objective.batches())).graph_root()])


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
