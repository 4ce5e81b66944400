"""The covariance of single examples' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.engine.output_metrics import Per
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.operators.empirical_fisher import EmpiricalFisherOperator
from curvature.parameters import Block
from curvature.sharding.tensors import whole


class GradientCovarianceOperator(EmpiricalFisherOperator):
    """Sigma = sum_i p_i (g_i - g)(g_i - g)' = sum_i p_i g_i g_i' - g g', with g = sum_i p_i g_i the gradient of L.

    Examples, weights p_i and gradients g_i are those of `EmpiricalFisherOperator`. The gradient of a batch of B
    examples drawn with probabilities p_i, with replacement, has covariance Sigma / B. If the data are a sample
    themselves, of covariance C, Sigma is (1 - sum_i p_i^2) C on average: `unbiased` divides by that factor, (N - 1) / N
    for equal weights. With `reduction="sum"` Sigma is W^2 times what it is for the mean.

    Symmetric; positive semi-definite up to rounding, which is that of Sigma + g g': where |g|^2 is far above the spread
    of the g_i, small eigenvalues are lost in rounding. Cost of one product: that of
    `EmpiricalFisherOperator`; at a new point one gradient more.

    Args:
        objective: one with `loss=`, any whose loss is a sum over examples, whose targets are one tensor.
        per: "example" or "target".
        unbiased: divide by 1 - sum_i p_i^2.
        block: restricts the matrix to some parameters; see `restrict`.

    Raises:
        InputError: as for `EmpiricalFisherOperator`; with `unbiased`, if all weight is on one example.

    Reference: McCandlish et al. (2018), An empirical model of large-batch training, section 2.2.

    Examples:
        >>> from curvature import GradientCovarianceOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.ones(2, 1)))
        >>> GradientCovarianceOperator(objective).to_dense()  # gradients (-2, 0) and (0, -4), of mean (-1, -2)
        tensor([[ 1., -2.],
                [-2.,  4.]])
    """

    @checked
    def __init__(
        self, objective: Objective, *, per: Per = "example", unbiased: bool = False, block: Block | None = None
    ) -> None:
        super().__init__(objective, per=per, block=block)
        self.unbiased = unbiased
        self._gradient: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gradient": None}

    def _before_walk(self) -> None:
        if self._note_point() or self._gradient is None:
            self._gradient = None
            self._gradient = whole(self.objective.gradient())
        if self._sums is None and (self._adds_up or self.unbiased):
            sums = self._count()
            if self.unbiased and 1 - sums[1] <= 100 * torch.finfo(torch.float64).eps:
                raise InputError("the unbiased covariance needs at least two examples with a weight; drop unbiased=.")
            self._sums = sums

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        assert self._gradient is not None
        g = self._gradient if block is None else block.take(self._gradient)
        along = X @ g
        if self._adds_up and self._sums is not None:
            along = along * (lin.example_shares(self.per).sum().to(g.dtype) / self._sums[0])
        part = torch.addr(super()._of_batch(lin, X, block), along, g, alpha=-1)
        return part / (1 - self._sums[1]) if self.unbiased and self._sums is not None else part
