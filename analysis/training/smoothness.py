"""How smooth the landscape is along the gradient: what loss and gradient do within a few steps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from analysis.training.point import PointHessian
from analysis.training.results import GradientSmoothness
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError, NonFiniteError
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import shifted

__all__ = ["MULTIPLES", "along_gradient", "gradient_smoothness"]

MULTIPLES = (0.5, 1.0, 2.0, 4.0)
"""Steps that are looked at, in learning rates."""


@in_whole_vectors
@full_precision
@checked
def gradient_smoothness(
    objective: Objective, *, lr: float, multiples: tuple[float, ...] = MULTIPLES
) -> GradientSmoothness:
    """Measure loss and gradient at theta - m lr g for several m: Santurkar's three measures of smoothness.

    The range of the loss and of the change of the gradient |g(theta - m lr g) - g| over m (how far the gradient
    predicts what is ahead), and the largest such change over the distance m lr |g|, the effective beta-smoothness along
    the gradient. On a quadratic that is |H g| / |g|. Batch normalisation makes all three smaller.

    Cost: a gradient, and one for each multiple.

    Args:
        objective: at theta.
        lr: learning rate.
        multiples: of it, positive.

    Raises:
        InputError: for arguments out of range.
        NonFiniteError: if the loss at theta is not finite. Where it is not on the way, the measures are infinite.

    Reference: Santurkar, Tsipras, Ilyas and Madry (2018), How does batch normalization help optimization?

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> objective = Objective(model, nn.MSELoss(), (torch.ones(4, 1), torch.zeros(4, 1)))  # w^2, curvature 2
        >>> found = gradient_smoothness(objective, lr=0.1)
        >>> round(found.effective_smoothness, 4), round(found.loss_low, 4), round(found.loss_high, 4)
        (2.0, 0.04, 0.81)
    """
    if not 0 < lr < math.inf or not multiples or not all(0 < m < math.inf for m in multiples):
        raise InputError(f"lr and multiples must be positive, got {lr} and {multiples}.")
    start = objective.space.current()
    _, gradient = objective.loss_and_gradient()
    return along_gradient(objective, start, gradient, lr=lr, multiples=multiples)


def along_gradient(
    objective: Objective,
    start: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    multiples: tuple[float, ...] = MULTIPLES,
    batches: list[Any] | None = None,
) -> GradientSmoothness:
    """Return the measures at a point whose gradient is known, on the objective's data or other batches."""
    norm = float(gradient.norm())
    losses, changes, slopes = [], [], []
    for multiple in multiples:
        try:
            with shifted(objective, start - multiple * lr * gradient):
                loss, there = PointHessian(objective, batches).loss_and_gradient()
            change = float((there - gradient).norm())
        except NonFiniteError:
            loss = change = math.inf
        losses.append(loss)
        changes.append(change)
        slopes.append(change / (multiple * lr * norm) if norm else math.nan)
    return GradientSmoothness(
        loss_low=min(losses),
        loss_high=max(losses),
        gradient_change_low=min(changes),
        gradient_change_high=max(changes),
        effective_smoothness=max(slopes),
    )
