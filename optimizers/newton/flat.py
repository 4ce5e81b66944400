"""Parameters of all groups as one vector: curvature couples them, so that Newton's systems are solved jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FlatParams"]


class FlatParams:
    """A list of parameters and its vector form, in float32 or wider, on the device of the first."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [p.numel() for p in self.params]
        self.n = sum(self.sizes)
        self.dtype = torch.float32
        for p in self.params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.device = self.params[0].device

    def get(self) -> Tensor:
        """Return a copy of the parameters, (n,)."""
        return self.flatten([p.detach() for p in self.params])

    def set(self, x: Tensor, *, keep: Sequence[bool] | None = None, unseen: bool = False) -> None:
        """Write x, (n,), into the parameters in place, but for those to keep as they are.

        Where autograd has not seen it, graphs made before stay usable, once the parameters are back.
        """
        with torch.no_grad():
            for i, (p, part) in enumerate(zip(self.params, self.split(x), strict=True)):
                if keep is None or not keep[i]:
                    (p.data if unseen else p).copy_(part)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one tensor a parameter as a vector; None counts as zero."""
        parts = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().reshape(-1).to(self.device, self.dtype)
            for t, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(parts)

    def split(self, x: Tensor) -> list[Tensor]:
        """Return x, (n,), in the shape, dtype and device of each parameter."""
        return [
            part.view(p.shape).to(p.device, p.dtype) for part, p in zip(x.split(self.sizes), self.params, strict=True)
        ]
