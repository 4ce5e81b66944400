"""Matrices whose entries belong to places in the data, which must therefore stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DataLoader, RandomSampler

from curvature.engine.linearize import Linearization
from curvature.errors import DataError
from curvature.objective.objective import Objective


def check_fixed_order(objective: Objective, why: str) -> None:
    """Refuse a loader that yields its examples in another order at each pass; walks over it twice, no model."""
    if objective.source.in_memory:
        return
    loader = objective.source.given
    shuffled = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    if not shuffled:
        objective.source.confirm()
    if shuffled or objective.shuffles:
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
