"""The Hessian of one point on some batches, for the short time of a reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvature.data.tensors import move_batch
from curvature.engine.linearize import Linearization
from curvature.linop import SymmetricOperator
from curvature.objective.objective import Objective
from curvature.parameters import Block

__all__ = ["PointBlock", "PointHessian"]


class PointHessian(SymmetricOperator):
    """The Hessian of an objective where it stands, on its data or other batches; nothing may move while it is used.

    `HessianOperator` makes sure at each product that the function is still the same one, which for a small network
    takes longer than the product. Here that is the caller's duty. Graphs of all batches are held at once, unless the
    objective has `keep_graphs=False`.

    Args:
        objective: the function.
        batches: other data than its own.
    """

    def __init__(self, objective: Objective, batches: list[Any] | None = None) -> None:
        n = objective.num_params
        super().__init__((n, n), objective.dtype, objective.device)
        self.objective = objective
        self.num_matvecs = 0
        self._batches = batches
        self._held = list(self._linearised()) if objective.may_keep_graphs else None

    def _linearised(self) -> Iterator[Linearization]:
        objective = self.objective
        batches = objective.batches() if self._batches is None else self._batches
        for index, batch in enumerate(batches):
            yield objective.linearise(move_batch(batch, objective.device), index, trust=objective.trust)

    def _walk(self) -> Iterator[Linearization]:
        yield from self._linearised() if self._held is None else self._held

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return L and its gradient (n,); after a product the gradient costs nothing more."""
        parts = ((lin.weight, torch.cat([lin.loss.to(self.dtype)[None], lin.gradient()])) for lin in self._walk())
        mean = self.objective.mean(parts)
        return float(mean[0]), mean[1:]

    def _matmat(self, X: Tensor) -> Tensor:
        return self.product(X, None)

    def product(self, X: Tensor, block: Block | None) -> Tensor:
        """Return H X, or the product with a diagonal block."""
        rows = X.T.contiguous()
        self.num_matvecs += len(rows)
        return self.objective.mean(((lin.weight, lin.hvp(rows, block)) for lin in self._walk()), [rows]).T


class PointBlock(SymmetricOperator):
    """A diagonal block of it."""

    def __init__(self, H: PointHessian, block: Block) -> None:
        super().__init__((block.num_params, block.num_params), H.dtype, H.device)
        self._H, self._block = H, block

    def _matmat(self, X: Tensor) -> Tensor:
        return self._H.product(X, self._block)
