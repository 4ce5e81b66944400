"""How far sums that are compared may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coarsest_eps", "tolerance"]

_COARSEST = 0.05  # relative difference that a check lets pass in the narrowest dtypes


def tolerance(rounding: float) -> float:
    """Return the relative difference that a check lets pass: rounding, with a limit in narrow dtypes."""
    return min(rounding, _COARSEST)


def coarsest_eps(*tensors: Tensor | None) -> float:
    """Return the largest unit of rounding among dtypes."""
    return max(torch.finfo(t.dtype).eps for t in tensors if t is not None)
