"""Where a loss has kinks: functions without a derivative somewhere, as the graph of one batch shows them.

Backward error analysis expands the loss to third order, and differences of Hessians take its third derivative for
granted. A network with ReLU or maximum pooling has neither: between two points a kink may lie, at any distance.
"""

from __future__ import annotations

from curvature.autograd.backward import walk
from curvature.errors import DataError
from curvature.objective.objective import Objective

__all__ = ["kinks", "smoothness_note"]

_KINKED = frozenset(
    {
        "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Aminmax", "Celu", "Clamp", "ClampMax",
        "ClampMin", "Cummax", "Cummin", "Elu", "FractionalMaxPool2D", "FractionalMaxPool3D", "Hardshrink",
        "Hardsigmoid", "Hardswish", "Hardtanh", "HuberLoss", "LeakyRelu", "Max", "MaxPool2DWithIndices",
        "MaxPool3DWithIndices", "Maximum", "Median", "Min", "Minimum", "MkldnnMaxPool2D", "MkldnnMaxPool3D",
        "MultiMarginLoss", "MultilabelMarginLoss", "PreluKernel", "Relu", "RreluWithNoise", "SmoothL1Loss",
        "Softshrink", "Sort", "Threshold", "Topk",
    }
)  # fmt: skip


def kinks(objective: Objective) -> tuple[str, ...]:
    """Return the names of functions with kinks in the graph of the first batch's loss, sorted; empty for a smooth one.

    Kinks count where the first or the second derivative jumps. Autograd's own functions are known by name; what a
    custom one does cannot be seen. Cost: a forward pass of one batch.

    Raises:
        DataError: if the objective has no batch.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> kinks(Objective(model, nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 1))))
        ('Relu',)
    """
    evaluator = objective.evaluator
    for index, batch in enumerate(objective.batches()):
        with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()):
            nodes = walk([evaluator.evaluate(batch, index).loss.grad_fn])
            return tuple(sorted({node.name().partition("Backward")[0] for node in nodes} & _KINKED))
    raise DataError("the objective has no batch to look at.")


def smoothness_note(objective: Objective, what: str) -> tuple[str, ...]:
    """Return one sentence that `what` is not to be trusted, if the loss has kinks; nothing if it is smooth."""
    found = kinks(objective)
    return (f"{what} need a smooth loss, and this one has kinks ({', '.join(found)}).",) if found else ()
