"""Rows and columns of any operator."""

from __future__ import annotations

from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linop import LinearOperator, MatrixLike, transpose
from curvature.parameters import Block


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

    def _matmat(self, X: Tensor) -> Tensor:
        return self.rows.take(self.A @ self.cols.embed(X, self.A.shape[1]))

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.cols.take(transpose(self.A) @ self.rows.embed(X, self.A.shape[0]))
