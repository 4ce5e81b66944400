"""Whether the targets of an objective are classes, and the share of them that have the largest score."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvature.objective.objective import Objective

__all__ = ["accuracy", "classifies", "outputs_of"]


def outputs_of(objective: Objective, batch: Any) -> Any:
    """Return (outputs, targets) of a batch as training has them."""
    forward = objective.settings["forward"]
    return (objective.model(batch[0]), batch[1]) if forward is None else forward(objective.model, batch)


@torch.no_grad()
def classifies(objective: Objective) -> bool:
    """Return whether targets are classes and outputs have one score for each along the second dimension.

    Whole numbers beside a single output, or beyond the last, are counts.
    """
    if objective.settings["loss"] is None:
        return False
    batch = next(iter(objective.batches()))
    modes = [(module, module.training) for module in objective.model.modules()]
    objective.model.eval()
    try:
        outputs, targets = outputs_of(objective, batch)
        whole = isinstance(targets, Tensor) and not targets.is_floating_point()
        if not whole or outputs.ndim < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            return False
        known = targets[_counts(objective, outputs, targets)]
        return outputs.shape[1] > 1 and bool(((known >= 0) & (known < outputs.shape[1])).all())
    except (TypeError, ValueError, AttributeError):
        return False
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def accuracy(objective: Objective) -> float:
    """Return the share of targets that have the largest score; ignored ones do not count. NaN if none counts."""
    right = total = 0
    for batch in objective.batches():
        outputs, targets = outputs_of(objective, batch)
        counts = _counts(objective, outputs, targets)
        right += int(((outputs.argmax(1) == targets) & counts).sum())
        total += int(counts.sum())
    return right / total if total else math.nan


def _counts(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return which targets count in the loss: not those ignored."""
    if objective.rule is not None:
        weights = objective.rule.term_weights(outputs, targets)
        if weights.shape == targets.shape:
            return weights > 0
    return targets != -100
