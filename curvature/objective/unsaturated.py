"""What loss, gradient and Hessian product would be were the data not fitted: their rounding is relative to that.

Where predictions are nearly certain, or residuals nearly zero, all three are what is left of larger numbers that cancel
(1 - p of p near 1), and carry the rounding of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.engine.linearize import Linearization
from curvature.errors import CurvatureError
from curvature.objective.interface import ObjectiveLike
from curvature.objective.shift import shifted

__all__ = ["Unsaturated", "sizes", "unsaturated"]

_SMALLER = 0.5  # parameters for which predictions are far from certain, where outputs are not known


@dataclass(frozen=True)
class Unsaturated:
    """Sizes that rounding is relative to; none is smaller than what is there."""

    loss: float
    gradient: float
    """Norm."""
    product: float
    """Norm of H v."""


def sizes(loss: Tensor, gradient: Tensor, product: Tensor) -> Unsaturated:
    """Return the sizes of what is there."""
    return Unsaturated(abs(float(loss)), float(gradient.norm()), float(product.norm()))


def unsaturated(lin: Linearization, objective: ObjectiveLike, batch: Any, v: Tensor, own: Unsaturated) -> Unsaturated:
    """Return the sizes at outputs of zero, or at smaller parameters where outputs are not known. Cost: two gradients.

    Args:
        lin: a batch, linearised.
        objective: whose batch it is.
        batch: the batch itself.
        v: (n,), what H is multiplied by.
        own: the sizes of what is there.
    """
    found = None
    try:
        if objective.closed_form_loss and not lin.in_blocks:
            found = _at_zero_outputs(objective.linearise(batch), v)
        else:
            with shifted(objective, _SMALLER * objective.space.current()):
                there = objective.linearise(batch)
                grown = _SMALLER**-2  # of gradients, which shrink with the weights of other layers
                found = sizes(there.loss, grown * there.gradient(), grown * there.hvp(v[None])[0])
                del there  # one graph at a time
    except (RuntimeError, ValueError, TypeError, CurvatureError):
        pass  # what is there has to do
    if found is None:
        return own
    pairs = zip(vars(own).values(), vars(found).values(), strict=True)
    return Unsaturated(*(max(a, b) if b < float("inf") else a for a, b in pairs))


def _at_zero_outputs(lin: Linearization, v: Tensor) -> Unsaturated:
    batch = lin.batch_outputs()
    zero = torch.zeros_like(batch.outputs)
    with torch.no_grad():
        loss = batch.rule.value(zero, batch.targets)
    g, M = batch.rule.output_gradient(zero, batch.targets), batch.rule.output_hessian(zero, batch.targets)
    rows = [part.reshape(1, -1).to(v.dtype) for part in (g, M(lin.jvp(v[None]).view(zero.shape).to(zero.dtype)))]
    return sizes(loss, *(lin.vjp(row)[0] for row in rows))
