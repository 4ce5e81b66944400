"""Matrices whose entries belong to places in the data, which must therefore stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from curvature.errors import DataError
from curvature.evaluation import tensors_in
from curvature.linearize import Linearization
from curvature.objective import Objective

__all__ = ["check_fixed_order", "ordered_linearizations"]


def check_fixed_order(objective: Objective, why: str) -> None:
    """Refuse a loader that yields its examples in another order at each pass. Cost: two walks over a loader, no model.

    Raises:
        DataError: with the reason and the remedy.
    """
    if objective._data.in_memory:
        return
    loader = objective._data._data
    shuffled = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    if shuffled or objective.shuffles or _order(objective) != _order(objective):
        _refuse(why)


def ordered_linearizations(objective: Objective, why: str) -> Iterator[Linearization]:
    """Yield the objective's linearised batches, as long as they come in the order they came in before."""
    for lin in objective.linearizations():
        if objective.shuffles and not objective.keeps_all_graphs:
            _refuse(why)
        yield lin


def _refuse(why: str) -> None:
    raise DataError(
        f"the loader shuffles and {why}: every pass would be another matrix. Pass a loader with shuffle=False, or "
        "list(loader)."
    )


def _order(objective: Objective) -> list[float]:
    """Return a number for each batch that depends on the order of its examples, unlike the fingerprint of its data."""
    return [sum(_mark(leaf) for leaf in tensors_in(batch)) for batch in objective.batches()]


def _mark(leaf: Tensor) -> float:
    entries = leaf.detach().reshape(-1).to("cpu", torch.float64)
    return float(entries @ torch.cos(1.0 + 12.9898 * torch.arange(entries.numel(), dtype=torch.float64)))
