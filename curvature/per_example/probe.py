"""Random arrays that sums of gradients are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """A rank-one array `left right'` in a parameter's shape, seen as a matrix of its first dimension by the others."""

    left: Tensor
    right: Tensor  # itself an outer product, of
    inner: Tensor  # over the second dimension, and
    outer: Tensor  # over all further ones

    @classmethod
    def draw(cls, shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Probe:
        rows, columns = (*shape[:2], 1, 1)[:2]
        further = torch.Size(shape[2:]).numel()
        left, inner, outer = (torch.randn(size, generator=generator).to(like) for size in (rows, columns, further))
        if columns * further == 1:
            left, inner, outer = left * inner * outer, torch.ones_like(inner), torch.ones_like(outer)
        return cls(left, torch.outer(inner, outer).reshape(-1), inner, outer)

    @property
    def flat(self) -> Tensor:
        return self.left if len(self.right) == 1 else torch.outer(self.left, self.right).reshape(-1)

    def of(self, flat: Tensor) -> Tensor:
        """Return its inner product with an array of the same shape, given as a vector; ()."""
        return self.left @ (flat if len(self.right) == 1 else flat.view(len(self.left), -1) @ self.right)
