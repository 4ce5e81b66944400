"""The diagonal blocks of a matrix, without what couples them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linop import SymmetricOperator
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.parameters import Block


class BlockDiagonalOperator(SymmetricOperator):
    """B = diag(A_11, ..., A_LL): y_l = A_ll x_l for every block l of parameters, and zero between blocks.

    Symmetric; every eigenpair of a block is one of B. A product equals those with `A.restrict(block)`, number for
    number, but walks the data once: graphs that are not kept are built once for all blocks.

    Cost of one product: the sum of those with the blocks, each less than one with A where its layer is near the loss.

    Args:
        A: the Hessian or Gauss-Newton matrix of an objective in all of its parameters.
        blocks: of the objective's space, disjoint; rows and columns of parameters in none of them are zero. Default:
            `objective.space.blocks`, one for each module that owns parameters.

    Raises:
        InputError: for another kind of matrix, no block, or blocks that overlap.
        ParameterSelectionError: for a block of another space.

    Examples:
        >>> from torch import nn
        >>> from curvature import HessianOperator, Objective
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.constant_(p, 2.0)
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> H = HessianOperator(Objective(model, nn.MSELoss(), data))  # of (v w)^2
        >>> H.to_dense()
        tensor([[ 8., 16.],
                [16.,  8.]])
        >>> BlockDiagonalOperator(H).to_dense()
        tensor([[8., 0.],
                [0., 8.]])
    """

    @checked
    def __init__(self, A: ObjectiveOperator, blocks: Sequence[Block] | None = None) -> None:
        if not isinstance(A, ObjectiveOperator):
            raise InputError(
                f"diagonal blocks are those of an operator of an objective, got {type(A).__name__}; for the "
                "blocks of other operators see SubmatrixOperator."
            )
        if A.block is not None:
            raise InputError(
                f"A is a diagonal block itself, {A.block.name!r}; pass the whole matrix, and the blocks to take."
            )
        space = A.objective.space
        chosen = space.blocks if blocks is None else blocks
        if not chosen:
            raise InputError("blocks must hold at least one block.")
        self.blocks = tuple(space.block(block) for block in chosen)
        positions = [i for block in self.blocks for i in block.positions]
        if len(set(positions)) < len(positions):
            twice = next(name for i, name in enumerate(space.names) if positions.count(i) > 1)
            raise InputError(f"blocks must be disjoint, but {twice!r} is in more than one of them.")
        super().__init__(A.shape, A.dtype, A.device)
        self.A = A

    def _matmat(self, X: Tensor) -> Tensor:
        products = self.A.products([block.take(X) for block in self.blocks], self.blocks)
        Y = torch.zeros_like(X, memory_format=torch.contiguous_format)
        for block, product in zip(self.blocks, products, strict=True):
            block.put(product, Y)
        return Y
