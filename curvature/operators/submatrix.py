"""Rows and columns of any operator."""

from __future__ import annotations

from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linop import LinearOperator, MatrixLike, transpose
from curvature.parameters import Block
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor


class SubmatrixOperator(LinearOperator):
    """A[rows, cols] for blocks of parameters, by full products with vectors that are zero outside `cols`.

    For a diagonal block of the Hessian or Gauss-Newton matrix `operator.restrict(...)` gives the same numbers for less.

    Args:
        A: any operator on the flat parameter vector.
        rows: block of the parameters whose entries of the product are kept.
        cols: block of the parameters the vectors run over.

    Raises:
        InputError: if a block reaches beyond the operator.
    """

    @checked
    def __init__(self, A: MatrixLike, rows: Block, cols: Block) -> None:
        if len(A.shape) != 2:
            raise InputError(f"A must have two dimensions, got shape {tuple(A.shape)}.")
        for what, block, size in (("rows", rows, A.shape[0]), ("cols", cols, A.shape[1])):
            if block.slices[-1].stop > size:
                raise InputError(
                    f"{what} reach entry {block.slices[-1].stop} of an operator of size {size}; use blocks of its own "
                    "space."
                )
        super().__init__((rows.num_params, cols.num_params), A.dtype, A.device)
        self.A, self.rows, self.cols = A, rows, cols

    @property
    def sharding(self) -> Layout | None:
        every: Layout | None = getattr(self.A, "sharding", None)
        return every if every is None else every.of(self.cols.positions)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.rows.take(self.A @ self._embedded(self.cols, X, self.A.shape[1]))

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.cols.take(transpose(self.A) @ self._embedded(self.rows, X, self.A.shape[0]))

    def _embedded(self, block: Block, X: Tensor, size: int) -> Tensor:
        if not isinstance(X, ShardedTensor):
            return block.embed(X, size)
        every: Layout = self.A.sharding  # type: ignore[attr-defined] # of a matrix that takes vectors in parts
        flat = ShardedTensor(X.local.new_zeros(every.num_local, X.shape[1]), every, 0)
        block.put(X, flat)
        return flat
