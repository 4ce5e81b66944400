"""What a product with an objective's matrix will take, without making one.

Seconds are those of a gradient, which is timed, times what products take in gradients. On a kept graph that is 1.3 to
2.4 for the Hessian and 1.1 to 1.5 for the Gauss-Newton matrix (`benchmarks/products/bench.py`), here 1.75 and 1.25; a
graph that is built anew costs 2 more, once for all columns. Bytes are those of the graph of the first batch, which is
built and watched.
"""

from __future__ import annotations

from curvature.engine.linearize import LOSS_HESSIAN
from curvature.environment.cost import median_seconds
from curvature.environment.memory import HeldMemory
from curvature.operators._objective_operator import ObjectiveOperator

__all__ = ["predicted_product"]

_COLUMN = {"hvp": 1.75, "ggnvp": 1.25}  # gradients that a column takes on a graph that is there
_REBUILT = 2.0  # gradients that building the graph of a product takes
_BACKWARD = 2 / 3  # of a gradient: all that is left of it where the graph of the loss is kept


def predicted_product(A: ObjectiveOperator, width: int) -> tuple[float, int]:
    """Return the seconds of a product with `width` columns and the bytes that its graphs will hold beyond the present.

    Cost: two to six gradients over the data, and the graph of one batch.
    """
    objective, product = A.objective, getattr(A, "_product", "ggnvp")
    objective.loss_and_gradient()  # loads, warms up, counts the batches
    seconds = median_seconds(objective.loss_and_gradient, objective.device)
    gradient = seconds / _BACKWARD if objective.keeps_all_graphs else seconds
    of_batch, num_batches = _graph_bytes(A, product), objective.num_batches or 1
    wanted = of_batch * num_batches if objective.may_keep_graphs else 0
    kept = wanted if objective.kept.keep is True else min(wanted, objective.kept.budget.num_bytes)
    all_kept = 0 < wanted == kept
    in_work = 0 if all_kept else of_batch
    columns = gradient * _COLUMN[product] * width + (0.0 if all_kept else gradient * _REBUILT)
    return columns, max(0, kept + in_work - objective.held_bytes)


def _graph_bytes(A: ObjectiveOperator, product: str) -> int:
    """Return what the graph of the first batch holds."""
    objective, meter = A.objective, HeldMemory()
    _, _, batch = next(iter(objective.source))
    lin = objective.linearise(batch, trust=objective.trust, meter=meter)
    if lin.weight == 0:
        return 0
    _ = lin._build_gradient() if product == "hvp" else lin._map(getattr(A, "_metric", LOSS_HESSIAN))
    return meter.held_bytes()
