"""The highest of many losses, of which none is looked at before it is asked for: no GPU waits for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["HighestLoss"]

_KEPT = 256  # losses that are kept before one is made of them


class HighestLoss:
    """Collects losses."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._number = -math.inf

    def note(self, loss: Tensor | float) -> None:
        """Add a loss, a number or a tensor with one entry."""
        if not isinstance(loss, Tensor):
            self._number = math.nan if math.isnan(loss) or math.isnan(self._number) else max(self._number, loss)
            return
        self._tensors.append(loss.detach())
        if len(self._tensors) == _KEPT:
            self._tensors = [self._largest()]

    def take(self) -> float:
        """Return the highest loss since this was called, NaN if one was or there was none; begin anew."""
        found = [self._number, *([float(self._largest())] if self._tensors else [])]
        self._tensors, self._number = [], -math.inf
        highest = math.nan if any(map(math.isnan, found)) else max(found)
        return math.nan if highest == -math.inf else highest

    def _largest(self) -> Tensor:
        try:
            return torch.stack(self._tensors).max()
        except RuntimeError:  # of different shapes or devices
            first = self._tensors[0]
            return torch.stack([loss.reshape(()).to(first) for loss in self._tensors]).max()
