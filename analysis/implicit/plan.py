"""What `curvature implicit` is asked for and what it costs: single examples cost more than their share of the data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from analysis.implicit.measure import example_trace_gradient
from analysis.records.plan import Plan, setting
from curvature.arguments import checked_fields
from curvature.data.tensors import tensors_in
from curvature.environment.cost import median_seconds
from curvature.objective.objective import Objective

__all__ = ["ImplicitPlan", "num_pieces", "num_products", "price"]

_SAMPLE = 4  # pieces that are timed


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ImplicitPlan(Plan):
    """How the model was, or would be, trained."""

    lr: float = setting(text="Learning rate of SGD.", above=0)
    batch_size: int | None = setting(None, "In examples. Default: the batches of the task as they are.")
    drop_last: bool = setting(False, "An epoch leaves out the examples that fill no batch.")
    momentum: float = setting(0.0, "Heavy-ball momentum of SGD.", least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay of SGD.", least=0)
    directions: bool = setting(True, "Look where the penalties push, too.")
    k: int = setting(3, "How many of the sharpest directions to look against.", least=1)


def price(objective: Objective, plan: ImplicitPlan) -> float:
    """Return the expected gradients of the loss over all data; a Hessian product counts as two."""
    if not plan.directions:
        return 3.5
    return 3.5 + 2.0 * num_products(plan.k) + 6.0 + _of_penalties(objective, plan.batch_size)


def num_products(k: int) -> int:
    """Return about how many products k of the sharpest directions take."""
    return 12 + 8 * k


def num_pieces(objective: Objective, batch_size: int | None) -> int:
    """Return how many batches, or with a batch size examples, have their gradients' penalties differentiated."""
    if batch_size is None:
        return objective.num_batches or 1
    return sum(_length(batch) for batch in objective.batches())


def _length(batch: Any) -> int:
    return next((t.shape[0] for t in tensors_in(batch) if t.ndim > 0), 1)


def _of_penalties(objective: Objective, batch_size: int | None) -> float:
    """Return what the gradients of the penalties cost, in gradients, from a few of the examples."""
    if batch_size is None:
        return 6.0
    sample = list(itertools.islice(objective.cut(1).batches(), _SAMPLE))
    some = objective.replace(data=sample)
    g = some.gradient()
    example_trace_gradient(some, g)  # the first is slower
    some.release()
    seconds = median_seconds(lambda: example_trace_gradient(some, g), objective.device)
    one = median_seconds(objective.loss_and_gradient, objective.device)
    return 4.0 + num_pieces(objective, batch_size) / len(sample) * seconds / one
