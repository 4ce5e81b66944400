"""Residuals that belong to single points, as those of physics-informed networks, and their Jacobian row by row at once.

Row i of J is the gradient of the residual at point i, which needs no other point. Batched over points (`vmap`) all rows
cost about as much as one gradient, where differentiating the vector of residuals costs one backward pass a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from curvature.autograd.functional import call_with
from curvature.errors import InputError

__all__ = ["PointwiseResiduals"]

Term = tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], Tensor]
"""(residual, points): residual(u, x) at one point x, with u the model as a function of a point; points (k, ...)."""


class PointwiseResiduals:
    """The residuals of a model at points, each divided by the root of its term's number of points.

    Calling it returns the residuals, (m,), so it is a closure for `LevenbergMarquardt` and `NaturalGradient`: half of
    the sum over terms of weight * (mean squared residual) is minimised. `jacobian` goes to the argument of that name.
    The residuals may differentiate u in x, with `torch.func`.

    Args:
        model: called on a batch of one point.
        terms: pairs (residual, points).
        weights: of the terms' mean squares; 1 for each by default.
        chunk_size: points whose rows are computed at once; all by default.

    Raises:
        InputError: if there is no term, or a negative weight.

    Examples:
        >>> u = torch.nn.Linear(1, 1)
        >>> slope = PointwiseResiduals(u, [(lambda f, x: torch.func.jacrev(f)(x)[0, 0] - 2.0, torch.rand(5, 1))])
        >>> slope().shape, slope.jacobian(list(u.parameters())).shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        *,
        weights: Sequence[float] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        weights = [1.0] * len(terms) if weights is None else weights
        if not terms or len(weights) != len(terms) or min(weights) < 0:
            raise InputError(
                "terms must hold at least one (residual, points), with a weight >= 0 each, got "
                f"{len(terms)} terms and weights {list(weights)}."
            )
        self.model, self.terms, self.chunk_size = model, list(terms), chunk_size
        self.factors = [(w / len(points)) ** 0.5 for w, (_, points) in zip(weights, terms, strict=True)]

    def __call__(self) -> Tensor:
        """Return the residuals, (m,), with their graph."""
        named: dict[str, Tensor] = dict(self.model.named_parameters())
        parts = []
        for factor, (residual, points) in zip(self.factors, self.terms, strict=True):
            at_points = vmap(self._at_point(residual), in_dims=(None, 0), chunk_size=self.chunk_size)
            parts.append(factor * at_points(named, points).reshape(-1))
        return torch.cat(parts)

    def jacobian(self, params: Sequence[Tensor]) -> Tensor:
        """Return the residuals' derivatives in these parameters of the model, (m, n)."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        if any(id(p) not in names for p in params):
            raise InputError("a parameter of the optimizer is none of the model's.")
        fixed = {name: p.detach() for name, p in self.model.named_parameters()}
        wanted = {names[id(p)]: p.detach() for p in params}
        blocks = []
        for factor, (residual, points) in zip(self.factors, self.terms, strict=True):
            at_point = self._at_point(residual)

            def chosen(some: dict[str, Tensor], x: Tensor, at_point: Any = at_point) -> Tensor:
                return at_point({**fixed, **some}, x).reshape(-1)

            rows = vmap(jacrev(chosen), in_dims=(None, 0), chunk_size=self.chunk_size)(wanted, points)
            columns = [rows[names[id(p)]].reshape(-1, p.numel()) for p in params]
            blocks.append(factor * torch.cat(columns, dim=1))
        return torch.cat(blocks)

    def _at_point(self, residual: Callable[..., Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        def at_point(named: dict[str, Tensor], x: Tensor) -> Tensor:
            def u(y: Tensor) -> Tensor:
                return call_with(self.model, named, y[None])[0]

            return residual(u, x)

        return at_point
