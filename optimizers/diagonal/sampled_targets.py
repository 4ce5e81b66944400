"""Random vectors on a model's outputs whose covariance is the Hessian of the loss there: E[u u'] = H.

They are gradients of the loss for targets drawn from the model's own prediction, scaled so that J'u is one draw with
E[(J'u)(J'u)'] = J' H J, the Gauss-Newton matrix of the loss as reduced over the batch. One backward pass a draw, first
derivatives only.

    loss                          drawn targets                u
    cross-entropy                 classes y ~ softmax(z)       sqrt(a / D) (softmax(z) - e_y) at each site
    squared error                 y ~ N(z, 1/2)                sqrt(2 / D) times a standard normal
    binary cross-entropy, logits  y ~ Bernoulli(sigmoid(z))    sqrt(c / D) (sigmoid(z) - y)

with D what a mean divides by (1 for a sum), and a, c the weights of the loss term: class weights and smoothing, 0 for
ignored targets. Noise is independent between sites, so that no mean over a batch of squared gradients is needed.

Reference: Liu, Li, Hall, Liang and Ma (2024), Sophia, Algorithm 2 (Gauss-Newton-Bartlett); Bartlett (1953).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.losses.rules import BinaryCrossEntropyWithLogits, CrossEntropy, LossRule, SquaredError

__all__ = ["sampled_output_gradient"]


def sampled_output_gradient(rule: LossRule, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
    """Return u of the outputs' shape with E[u] = 0 and E[u u'] the Hessian of the loss in the outputs.

    Args:
        rule: of the loss, from `curvature.losses.rules.loss_rule`.
        outputs: of the model, without graph.
        targets: of the batch; only their weights count, and which of them are ignored.
        generator: source of the draws, on the outputs' device.

    Raises:
        InputError: for losses that are not minus the logarithm of a probability known here.
    """
    z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    if isinstance(rule, CrossEntropy):
        noise = _class_noise(z, generator, dim=1 if z.ndim > 1 else 0)
    elif isinstance(rule, SquaredError):
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    elif isinstance(rule, BinaryCrossEntropyWithLogits):
        p = z.sigmoid()
        noise = p - torch.bernoulli(p, generator=generator)
    else:
        raise InputError(
            f"targets can be sampled for cross-entropy, mean squared error and binary cross-entropy with logits, got "
            f'{rule.loss!r}; use curvature="hessian-diagonal" for other losses.'
        )
    return (noise * _curvature_of_terms(rule, z, targets).sqrt()).to(outputs.dtype)


def _class_noise(z: Tensor, generator: torch.Generator, dim: int) -> Tensor:
    """Return softmax(z) - e_y with y ~ softmax(z), along `dim`."""
    p = z.softmax(dim)
    rows = p.movedim(dim, -1).reshape(-1, p.shape[dim])
    y = torch.multinomial(rows, 1, generator=generator)
    drawn = rows.scatter_add(1, y, -torch.ones_like(y, dtype=p.dtype))
    moved = p.movedim(dim, -1)
    return drawn.view(moved.shape).movedim(-1, dim)


def _curvature_of_terms(rule: LossRule, z: Tensor, targets: Any) -> Tensor:
    """Return the factor, broadcast over the outputs, between the covariance of the plain noise and the Hessian."""
    scale = 1.0 if rule.reduction == "sum" else 1.0 / rule.num_terms(z, targets)
    if isinstance(rule, CrossEntropy):
        dim = 1 if z.ndim > 1 else 0
        return (rule._site_weights(z, targets, dim) * scale).unsqueeze(dim)
    if isinstance(rule, SquaredError):
        return rule.entry_curvatures(z, targets).to(z.device)
    y = targets.to(z.dtype)
    factor = torch.full_like(z, scale)
    if (pos_weight := rule.settings.get("pos_weight")) is not None:
        factor = factor * (1 - y + y * pos_weight.to(z))
    if (weight := rule.settings.get("weight")) is not None:
        factor = factor * weight.to(z)
    return factor
