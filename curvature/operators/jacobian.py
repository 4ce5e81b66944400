"""The Jacobian of a model's outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import Self

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.errors import DataError, InputError
from curvature.linop import LinearOperator
from curvature.objective.objective import Objective
from curvature.operators._objective_operator import block_within, check_fixed_order, check_order_kept, check_split
from curvature.parameters import Block, Selection

_WHY = "rows of the Jacobian belong to places in the data"


class JacobianOperator(LinearOperator):
    """J, (M, n): the derivatives of all M outputs of the model on all data in the n parameters; no loss, no weights.

    Rows are in the order of the data: the outputs of the first batch in row-major order, then those of the second, and
    so on, whether their targets count or not. `J @ X` is (M, k) for X (n, k) of parameters; `J.T` is an operator (n, M)
    and `J.T @ U` is (n, k). Outputs depend on the batch they are in where the model couples examples.

    Cost of one product on kept graphs: about 2/3 of a gradient with J.T and as much with J, which differentiates J'u in
    the u it is linear in. A block of k columns walks the data once. `to_dense()` takes the shorter side.

    Args:
        objective: one with `loss=`, whose forward returns (outputs, targets) with outputs a tensor; its data come in
            the same order at each pass.
        block: restricts the matrix to the columns of some parameters; see `restrict`.

    Raises:
        InputError: if the objective has no split between model and loss, or its data are spread over ranks.
        DataError: if the loader shuffles, or batches change their size.

    Reference: Townsend (2017), A new trick for calculating Jacobian vector products.

    Examples:
        >>> import torch
        >>> from curvature import JacobianOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> J = JacobianOperator(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(3, 1))))
        >>> J.to_dense()  # of x w: x itself
        tensor([[1., 2.],
                [3., 4.],
                [5., 6.]])
        >>> J.T @ torch.ones(3)
        tensor([ 9., 12.])
    """

    @checked
    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        check_split(objective, "the Jacobian of the outputs")
        if objective.process_group is not None:
            raise InputError(
                "the Jacobian has a row for each output, and the ranks of a process_group hold different ones; build "
                "it of an objective without process_group= on each rank, for the rows of that rank."
            )
        check_fixed_order(objective, _WHY)
        self._sizes = [lin.num_outputs for lin in objective.linearizations()]
        n = objective.num_params if block is None else block.num_params
        super().__init__((sum(self._sizes), n), objective.dtype, objective.device)
        self.objective = objective
        self.block = block

    def restrict(self, selection: Selection) -> Self:
        """Return the columns of some parameters, on the same graphs; see `HessianOperator.restrict`."""
        restricted = copy.copy(self)
        restricted.block = block_within(self.objective, self.block, selection)
        restricted.shape = (self.shape[0], restricted.block.num_params)
        return restricted

    def to_dense(self) -> Tensor:
        M, n = self.shape
        return super().to_dense() if n <= M else self.T.to_dense().T.contiguous()

    def _matmat(self, X: Tensor) -> Tensor:
        rows = X.T.contiguous()
        return torch.cat([lin.jvp(rows, self.block) for lin in self._batches()], dim=1).T

    def _rmatmat(self, U: Tensor) -> Tensor:
        parts = U.T.split(self._sizes, dim=1)
        total = U.new_zeros(U.shape[1], self.shape[1])
        for lin, part in zip(self._batches(), parts, strict=False):  # so that one batch too many is seen
            total += lin.vjp(part.contiguous(), self.block)
        return total.T

    def _batches(self) -> Iterator[Linearization]:
        """Yield the linearised batches, as long as they are those that the operator was built of."""
        for place, lin in enumerate(self.objective.linearizations()):
            check_order_kept(self.objective, _WHY)
            if place >= len(self._sizes) or lin.num_outputs != self._sizes[place]:
                raise DataError(
                    f"batch {place} has {lin.num_outputs} outputs, other than when the operator was built; build a new "
                    "one."
                )
            yield lin
