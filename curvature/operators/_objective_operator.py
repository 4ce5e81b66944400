"""What all matrices of an objective share: shape and place of its parameters, sums over its batches, restriction."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

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
        rows = X.T.contiguous()
        return self.objective.reduce(lambda lin: getattr(lin, self._product)(rows, self.block)).T

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
