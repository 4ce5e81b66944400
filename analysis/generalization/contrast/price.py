"""What trainings side by side will cost, from a few steps of the first."""

from __future__ import annotations

from typing import Any

import torch

from analysis.generalization.contrast.measure import prepared
from analysis.generalization.ensemble import Ensemble, seconds_of_step
from analysis.generalization.point import seconds_at
from analysis.run.pool import workers_of
from analysis.run.study import Price
from analysis.show import wording
from curvature.objective.objective import Objective

__all__ = ["price_of"]


def price_of(objective: Objective, plan: Any, conditions: int, test_data: Any) -> Price:
    """Return the price of so many trainings, all of their steps; those that end early cost less."""
    shared, _ = prepared(objective, plan, torch.Generator(), test_data)
    ensemble = Ensemble(shared.model, range(plan.repeats))
    data = shared.data.inputs, shared.noisy
    each = plan.steps * seconds_of_step(ensemble, shared.loss, *data, plan)
    each += plan.repeats * seconds_at(shared.model, shared.data.num_classes * len(shared.data.labels))
    processes = workers_of(plan.processes, conditions)
    text = (
        f"at most {wording.count(conditions)} trainings of {wording.count(plan.repeats)} networks and their curvature"
    )
    return Price(
        f"{text}, {wording.duration(each)} each", conditions * each / processes, total=conditions, unit="trainings"
    )
