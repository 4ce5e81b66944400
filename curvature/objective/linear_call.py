"""Linear layers among the modules that run when their parameters are gathered: derivatives in closed form.

y = x W' + b is linear in x and in (W, b), so no output has to be computed again for a derivative, and no first
derivative for a second one. With inputs X (N, in) and vectors U (N, out) on the outputs, one example a row, the first
derivatives in X, W and b are U W, U'X and the sum of U's rows. What those change by along (C, D, d) has the derivatives
C W' + X D' + d in U, U D in X and U'C in W. Of what is as large as W, one is held at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Linear"]


class Linear:
    """A linear layer, by the places that its parameters have in a walk over the data."""

    def __init__(self, places: tuple[int, ...], weight: int, bias: int | None) -> None:
        self.places, self.weight, self.bias = places, weight, bias

    @classmethod
    def of(cls, module: nn.Module, keys: Mapping[str, int], places: tuple[int, ...], forward: Any) -> Linear | None:
        """Return what a module is to its call; None for any other module."""
        is_plain = isinstance(module, nn.Linear) and getattr(forward, "__func__", None) is nn.Linear.forward
        held = {name for name, p in module._parameters.items() if p is not None}  # not by name, which gathers it
        usual = set(keys) == held and {"weight"} <= held <= {"weight", "bias"} and len(places) == len(keys)
        return cls(places, keys["weight"], keys.get("bias")) if is_plain and usual else None

    def takes(self, inputs: Sequence[Tensor], vectors: Sequence[Tensor | None], parts: Sequence[Tensor]) -> bool:
        """Whether it was called in the plain way, in one dtype and without autocast."""
        if len(inputs) != 1 or len(vectors) != 1 or vectors[0] is None:
            return False
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_floating_point() for t in (inputs[0], vectors[0]))
        dtypes = {t.dtype for t in (inputs[0], vectors[0], *parts)}
        return plain and len(dtypes) == 1 and not torch.is_autocast_enabled(inputs[0].device.type)

    def first(self, exchange: Any, x: Tensor, u: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the derivatives in x and, in the last pass, in the parameters; None for what does not record."""
        W = self._gathered(exchange)
        in_x = u @ W if x.requires_grad else None
        del W
        X, U = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
        found: dict[int, Tensor] = {}
        for i, part in zip(self.places, parts, strict=True):
            if exchange.which == "final" and part.requires_grad:
                found[i] = U.T @ X if i == self.weight else U.sum(dim=0)
        return in_x, *map(found.get, self.places)

    def second(
        self, exchange: Any, x: Tensor, u: Tensor, parts: Sequence[Tensor], directions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Return the derivatives in u and, in the last pass, in x and the parameters, of `first` along directions.

        Those of parameters are asked for where they are not None, and taken from the walk.
        """
        X, U = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
        along_x, *asked = directions
        C, W = None if along_x is None else along_x.reshape(X.shape), self._gathered(exchange)
        in_u = torch.zeros_like(U) if C is None else C @ W.T
        del W
        along = exchange.directions(self.places) if any(d is not None for d in asked) else {}
        in_x = in_weight = None
        if (D := along.pop(self.weight, None)) is not None:
            in_u.addmm_(X, D.T)
            in_x = (U @ D).view(x.shape) if x.requires_grad and exchange.which == "final" else None
        if (d := along.pop(self.bias, None)) is not None:
            in_u.add_(d)
        del D, d
        if C is not None and exchange.which == "final" and parts[self.places.index(self.weight)].requires_grad:
            in_weight = U.T @ C
        return in_u.view(u.shape), in_x, *(in_weight if i == self.weight else None for i in self.places)

    def _gathered(self, exchange: Any) -> Tensor:
        weight: Tensor = exchange.parameters(self.places)[self.places.index(self.weight)]
        return weight
