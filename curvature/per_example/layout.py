"""Where the examples of a batch lie in the tensors that a model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from curvature.per_example.forms import Form

__all__ = ["Build", "Examples", "Layout"]


class Layout(Enum):
    """How the N examples lie in a tensor."""

    BLOCKS = "first dimension N k, k consecutive rows an example"
    SECOND = "second dimension N, as in attention that puts time first"
    INTERLEAVED = "first dimension k N, every N-th row an example's"


@dataclass(frozen=True)
class Examples:
    """N examples and how they lie in the output of a call, and in its input."""

    count: int
    layout: Layout = Layout.BLOCKS
    repeated: bool = False
    """Whether the operand in question repeats one part of a parameter for each example, along its first dimension."""

    def arranged(self, x: Tensor) -> Tensor | None:
        """Return x as (N, k, ...), or None if it has no such layout."""
        if x.layout is not torch.strided:
            return None
        if self.layout is Layout.SECOND:
            return x.transpose(0, 1) if x.ndim >= 2 and x.shape[1] == self.count else None
        if x.ndim == 0 or x.shape[0] == 0 or x.shape[0] % self.count:
            return None
        k = x.shape[0] // self.count
        if self.layout is Layout.BLOCKS:
            return x.reshape(self.count, k, *x.shape[1:])
        return x.reshape(k, self.count, *x.shape[1:]).transpose(0, 1)

    def rows(self, x: Tensor) -> Tensor | None:
        """Return x (..., p) as (N, 1, T, p), T the rows of an example; None if it has no such layout."""
        x_arranged = self.arranged(x) if x.ndim >= 2 else None
        if x_arranged is None or (self.layout is Layout.SECOND and x.ndim < 3):
            return None
        return x_arranged.reshape(self.count, 1, -1, x.shape[-1])


Build: TypeAlias = Callable[[Tensor, Examples], "Form | None"]
"""(gradient in a call's output, where examples lie in it) -> per-example gradients of an operand, if they exist."""
