"""What rounding leaves of a float32 gradient where predictions are nearly certain, or residuals nearly zero.

The gradient in the outputs is then what is left of larger numbers that cancel (1 - p of p near 1, z - y of z near y),
and carries their rounding. It is measured against float64 at outputs that are moved by a unit in their last place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.engine.linearize import Linearization
from curvature.losses.rules import LossRule, SquaredError

__all__ = ["cancellation_notes", "see_cancellation"]

_KEY = "cancellation"
_SMALL = 1e-3  # of a loss, in what it would be were nothing fitted: above it four digits are left
_WORTH_A_NOTE = 1e-3  # of the gradient
_NONE_LEFT = 1e-13  # of a loss: below it 1 - p keeps no three digits in float64, of which the measure is made


@dataclass
class _Rounding:
    """Squares, summed over batches, each as it counts in the loss."""

    error: float = 0.0
    gradient: float = 0.0
    fitted: bool = True
    """Every batch so far is fitted; one that is not has nearly all of the gradient, and no such rounding."""
    in_float64: bool = False
    """Float64 does not hold the gradient of some batch, either."""

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.gradient) if self.fitted and self.gradient > 0 else 0.0


def see_cancellation(measured: MutableMapping[Hashable, Any], lin: Linearization) -> None:
    """Add a batch, which was not seen at this point before. Cost: small against a gradient, and where it fits only."""
    rule, outputs, targets = lin._evaluator.rule, lin._evaluation.outputs, lin._evaluation.targets
    if rule is None or not rule.closed_form or lin.in_blocks or lin.weight == 0:
        return
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.dtype != torch.float32:
        return
    rounding = measured.setdefault(_KEY, _Rounding())
    z = outputs.detach()
    rounding.fitted = rounding.fitted and _is_fitted(rule, z, targets, float(lin.loss))
    if not rounding.fitted:
        return
    gradient = rule.output_gradient(z, targets).double()
    size = float(gradient.norm())
    try:
        loss, wide = _in_float64(rule, z, targets)
        error = float((gradient - wide).norm())
        if not isinstance(rule, SquaredError) or size > 0:  # residuals may be zero, what is left of 1 - p is not
            size = max(size, float(wide.norm()))
        if not isinstance(rule, SquaredError) and _per_term(rule, z, targets, loss) < _NONE_LEFT:
            error = size = max(size, loss)
            rounding.in_float64 = True
    except (RuntimeError, TypeError):  # a function of its own with settings in float32
        error = size * min(1.0, torch.finfo(z.dtype).eps / max(_per_term(rule, z, targets, float(lin.loss)), 1e-30))
    rounding.error += (lin.weight * error) ** 2
    rounding.gradient += (lin.weight * size) ** 2


def _in_float64(rule: LossRule, z: Tensor, targets: Any) -> tuple[float, Tensor]:
    """Return loss and gradient in float64, at outputs that are off by a unit in their last place, to either side."""
    up = torch.arange(z.numel(), device=z.device).view(z.shape) % 2 == 0
    moved = z.double() * (1 + torch.where(up, 1.0, -1.0) * torch.finfo(z.dtype).eps)
    wide = copy.copy(rule)
    if isinstance(rule.loss, nn.Module):
        wide.loss = copy.deepcopy(rule.loss).double()
    targets = targets.double() if targets.is_floating_point() else targets
    return float(wide.value(moved, targets)), wide.output_gradient(moved, targets)


def cancellation_notes(measured: MutableMapping[Hashable, Any]) -> list[str]:
    """Return what a reader of the results should know."""
    rounding = measured.get(_KEY, _Rounding())
    if rounding.relative < _WORTH_A_NOTE:
        return []
    other = "model.double() and data in float64 do not."
    if rounding.in_float64:
        other = "float64 holds no more of it where a loss is below 1e-13."
    return [
        f"The data are fitted so closely that rounding to float32 is {rounding.relative:.0e} of the gradient at the "
        f"outputs, as measured against float64; derivatives in the parameters carry it. {other}"
    ]


def _is_fitted(rule: LossRule, z: Tensor, targets: Any, loss: float) -> bool:
    per_term = _per_term(rule, z, targets, loss)
    if isinstance(rule, SquaredError):
        return per_term < _SMALL * float(z.square().mean())
    if per_term < _SMALL:
        return True
    if not targets.is_floating_point() and not rule.settings.get("label_smoothing"):
        return False
    terms = rule.num_terms(z, targets)  # targets that are no classes leave a loss where they are met: p - t is compared
    size = float(rule.output_gradient(z, targets).norm()) * (1.0 if rule.reduction == "sum" else terms)
    return size < _SMALL * math.sqrt(terms)


def _per_term(rule: LossRule, z: Tensor, targets: Any, loss: float) -> float:
    return loss / (rule.num_terms(z, targets) if rule.reduction == "sum" else 1.0)
