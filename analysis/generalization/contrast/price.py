"""What trainings side by side will cost, from a few steps of the first."""

from __future__ import annotations

import time
from typing import Any

import torch

from analysis.generalization.contrast.measure import prepared
from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.generalization.point import seconds_at
from analysis.run.pool import usable_cores
from analysis.run.study import Price
from analysis.show import wording
from curvature.objective.objective import Objective

__all__ = ["price_of"]

_STEPS = 10


def price_of(objective: Objective, plan: Any, conditions: int, test_data: Any) -> Price:
    """Return the price of so many trainings, all of their steps; those that end early cost less."""
    shared, _ = prepared(objective, plan, torch.Generator(), test_data)
    ensemble = Ensemble(shared.model, range(plan.repeats))
    for steps in (2, _STEPS):  # the first ones warm up
        begin = time.perf_counter()
        recipe = Recipe(steps=steps, lr=plan.lr, optimizer=plan.optimizer, batch_size=plan.batch_size)
        ensemble.train(shared.loss, shared.data.inputs, shared.noisy, recipe)
    each = (time.perf_counter() - begin) / _STEPS * plan.steps
    each += plan.repeats * seconds_at(shared.model, shared.data.num_classes * len(shared.data.labels))
    processes = min(plan.processes or usable_cores(), conditions)
    text = (
        f"at most {wording.count(conditions)} trainings of {wording.count(plan.repeats)} networks and their curvature"
    )
    return Price(
        f"{text}, {wording.duration(each)} each", conditions * each / processes, total=conditions, unit="trainings"
    )
