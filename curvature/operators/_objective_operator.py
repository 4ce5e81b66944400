"""What all matrices of an objective share: shape and place of its parameters, sums over its batches, restriction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from curvature.cost import timed
from curvature.linearize import Linearization
from curvature.linop import LinearOperator
from curvature.objective import Objective
from curvature.parameters import Block, Selection

__all__: list[str] = []


class ObjectiveOperator(LinearOperator):
    """A symmetric matrix that is a weighted sum over batches; a subclass names the product of a linearised batch."""

    _product: ClassVar[Literal["hvp", "ggnvp"]]

    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        n = objective.num_params if block is None else block.num_params
        super().__init__((n, n), objective.dtype, objective.device)
        self.objective = objective
        self.block = block

    def _matmat(self, X: Tensor) -> Tensor:
        return self.products([X], [self.block])[0]

    def products(
        self,
        X: Sequence[Tensor],
        blocks: Sequence[Block | None],
        *,
        observe: Callable[[int, float, list[Tensor]], None] | None = None,
    ) -> list[Tensor]:
        """Return A_BB X_B for several blocks B of parameters, (m_B, k_B) each, in one walk over the data.

        Graphs that are not kept are thus built once for all blocks.

        Args:
            X: for every block its columns, (m_B, k_B).
            blocks: of the objective's space; None stands for all parameters.
            observe: told the place and weight of every batch that counts, and its own products.
        """
        rows = [x.T.contiguous() for x in X]

        def of_batch(lin: Linearization) -> Tensor:
            parts = [getattr(lin, self._product)(r, block) for r, block in zip(rows, blocks, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

        def split(packed: Tensor) -> list[Tensor]:
            if len(rows) == 1:
                return [packed.T]
            pieces = packed.split([r.numel() for r in rows])
            return [piece.view(r.shape).T for piece, r in zip(pieces, rows, strict=True)]

        def pass_on(index: int, weight: float, packed: Tensor) -> None:
            assert observe is not None
            observe(index, weight, split(packed))

        return split(self.objective.reduce(of_batch, observe=None if observe is None else pass_on))

    def timed(self, x: Tensor) -> tuple[Tensor, float, float]:
        """Return A x for a vector (n,), the seconds that any block would have taken, and those of a column.

        The first are spent on data and on graphs that are not kept; they are paid once for all columns.
        """
        seconds = 0.0

        def of_batch(lin: Linearization) -> Tensor:
            nonlocal seconds
            lin.prepare(self._product)
            part, spent = timed(lambda: getattr(lin, self._product)(x[None], self.block), self.device)
            seconds += spent
            return part

        product, total = timed(lambda: self.objective.reduce(of_batch)[0], self.device)
        return product, max(total - seconds, 0.0), seconds

    def restrict(self, selection: Selection) -> Self:
        """Return the diagonal block of the matrix for some of its parameters, on the same graphs.

        A product with the block costs less than one with the whole matrix and equals that on vectors that are zero
        outside.

        Args:
            selection: globs over parameter or module names, modules, a predicate, or a `Block` of the objective's
                space.

        Raises:
            ParameterSelectionError: if it matches none of this operator's parameters.
        """
        space = self.objective.space
        block = space.block(selection, self.objective.model)
        if self.block is not None:
            inside = set(self.block.parameters)
            block = space.block({name: space.tensors[name] for name in block.parameters if name in inside})
        return type(self)(self.objective, block)
