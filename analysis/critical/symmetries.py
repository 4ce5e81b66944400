"""Directions along which the loss cannot change: scales of layers that the network makes up for.

A loss with L(exp(t D) theta) = L(theta) for all t, D = diag(d), has along v = D theta, in every point,

    g'v = 0,    H v = -D g,

so that v is in the null space of H where g = 0, whatever the data. Which scales these are is tried, not derived from
the architecture: one layer (in front of a normalisation), or one against the next (with ReLUs between them).

Reference: Kunin, Sagastuy-Brena, Ganguli, Yamins and Tanaka (2021), Neural mechanics, arXiv 2012.04728.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analysis.critical.results import Symmetry
from curvature.environment.autocast import full_precision
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at
from curvature.operators.hessian import HessianOperator

__all__ = ["rescaling_symmetries", "try_rescaling"]

_TRIED = 1.5  # factor by which scales are changed


def try_rescaling(objective: Objective, exponents: Tensor, *, name: str) -> Symmetry:
    """Try whether multiplying parameter i by a^(d_i) leaves the loss as it is. Cost: 3 losses, a gradient, a product.

    Args:
        objective: the loss.
        exponents: d, (n,).
        name: for display.
    """
    d, theta = exponents.to(objective.device, objective.dtype), objective.space.current()
    v = d * theta
    base = loss_at(objective, theta).value
    changes = [abs(loss_at(objective, theta * _TRIED ** (s * d)).value - base) for s in (1, -1)]
    tiny = torch.finfo(objective.dtype).tiny
    g = objective.gradient()
    Hv, Dg = HessianOperator(objective) @ v, d * g
    cosine = float((g @ v).abs() / (g.norm() * v.norm()).clamp_min(tiny))
    residual = float((Hv + Dg).norm() / (Hv.norm() + Dg.norm()).clamp_min(tiny))
    change = max(changes) / max(abs(base), tiny) if not any(map(math.isnan, changes)) else math.nan
    eps = torch.finfo(next(iter(objective.space.tensors.values())).dtype).eps
    bound = 100 * eps**0.75  # sums of many rounded terms: 2e-10 in float64, 6e-4 in float32
    # Where g, or H v and D g, vanish, what is left of them is rounding, and the loss itself decides.
    scale = float(g.norm())
    vanishing = scale * float(v.norm()) <= bound * max(abs(base), tiny)
    holds = change <= bound and (vanishing or (cosine <= bound and residual <= bound**0.5))
    return Symmetry(
        name=name, loss_change=change, gradient_residual=cosine, hessian_residual=residual, holds=bool(holds)
    )


@in_whole_vectors
@full_precision
def rescaling_symmetries(objective: Objective) -> tuple[tuple[Symmetry, ...], Tensor]:
    """Try the scale of every layer with a weight matrix, and of each against the next; return trials and directions.

    Between two layers the weights and bias of the first are multiplied, the weights of the second divided; "next" is
    meant in the order of the parameters. Cost: see `try_rescaling`, twice for each layer.

    Returns:
        All trials, and the unit vectors D theta / |D theta| of those that hold, (n, s).
    """
    space, n = objective.space, objective.num_params
    layers = [b for b in space.blocks if any(space.tensors[name].ndim >= 2 for name in b.parameters)]
    candidates = []
    for place, layer in enumerate(layers):
        ones = layer.embed(torch.ones(layer.num_params), n)
        candidates.append((f"scale of {layer.name}", ones))
        if place + 1 < len(layers):
            following = layers[place + 1]
            matrices = {p: space.tensors[p] for p in following.parameters if space.tensors[p].ndim >= 2}
            weights = space.block(matrices)
            against = ones - weights.embed(torch.ones(weights.num_params), n)
            candidates.append((f"scale of {layer.name} against {following.name}", against))
    trials, found = [], []
    for name, d in candidates:
        trial = try_rescaling(objective, d, name=name)
        trials.append(trial)
        v = d.to(objective.device, objective.dtype) * space.current()
        if trial.holds and bool(v.any()):
            found.append(v / v.norm())
    directions = torch.stack(found, dim=1) if found else space.current().new_zeros(n, 0)
    return tuple(trials), directions
