"""K-FAC as the preconditioner that conditioning is measured under."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.errors import DataError, InputError
from curvature.layerwise.kronecker import kronecker_factors
from curvature.objective.objective import Objective

__all__ = ["kfac_root"]

_SAMPLES = 16


def kfac_root(
    objective: Objective, divisor: Tensor, floor: float, generator: torch.Generator
) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """Return X -> P^-1/2 X with P = B (x) A + damping for each layer, and which parameters have no factors.

    Args:
        objective: with split between model and loss.
        divisor: (n,), P's diagonal for parameters without factors.
        floor: the damping, as a share of the largest eigenvalue of the products.
        generator: of the targets that are drawn.
    """
    try:
        found = kronecker_factors(objective, "kfac", mc_samples=_SAMPLES, generator=generator)
    except (InputError, DataError) as error:
        return None, str(error)
    tops = [
        torch.linalg.eigvalsh(f.A)[-1].clamp_min(0) * torch.linalg.eigvalsh(f.B)[-1].clamp_min(0)
        for f in found.layers.values()
    ]
    damping = floor * float(torch.stack(tops).max())
    if not damping > 0:
        return None, "all factors are zero."
    root = found.preconditioner(damping, power=0.5, others=divisor)
    left = ", ".join(found.uncovered)
    return (lambda X: (root @ X).to(X.dtype)), f"{left} have no factors and their diagonal instead." if left else ""
