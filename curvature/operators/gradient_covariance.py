"""The covariance of single examples' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linearize import Linearization
from curvature.objective import Objective
from curvature.operators.empirical_fisher import EmpiricalFisherOperator
from curvature.output_metrics import Per, example_shares
from curvature.parameters import Block

__all__ = ["GradientCovarianceOperator"]


class GradientCovarianceOperator(EmpiricalFisherOperator):
    """Sigma = sum_i p_i (g_i - g)(g_i - g)' = sum_i p_i g_i g_i' - g g', with g = sum_i p_i g_i the gradient of L.

    Examples, their weights p_i (which add up to 1) and their gradients g_i are those of `EmpiricalFisherOperator`. The
    gradient of a batch of B examples drawn with probabilities p_i, with replacement, has covariance Sigma / B. If the
    data are a sample themselves, g_i independent with one mean and one covariance C, then Sigma is
    (1 - sum_i p_i^2) C on average, since the part of g in each g_i takes away twice p_i C and gives back sum_j p_j^2 C:
    `unbiased` divides by that factor, which is (N - 1) / N for equal weights.

    With `reduction="sum"` Sigma is W times what it is for the mean, as all matrices of the objective are; then it is
    sum_i w_i (g_i - g / W)(g_i - g / W)' with g the gradient of L.

    Symmetric; positive semi-definite up to rounding, which is that of E = Sigma + g g': where |g|^2 is far above the
    spread of the g_i, small eigenvalues drown.

    Cost of one product: that of `EmpiricalFisherOperator`; at a new point one gradient more.

    Args:
        objective: one with `loss=`, any whose loss is a sum over examples, whose targets are one tensor.
        per: "sequence" or "target".
        unbiased: divide by 1 - sum_i p_i^2.
        block: restricts the matrix to some parameters; see `restrict`.

    Raises:
        InputError: as for `EmpiricalFisherOperator`; with `unbiased`, if all weight is on one example.

    Reference: McCandlish et al. (2018), An empirical model of large-batch training, section 2.2.

    Example:
        >>> from curvature import GradientCovarianceOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.ones(2, 1)))
        >>> GradientCovarianceOperator(objective).to_dense()  # gradients (-2, 0) and (0, -4), of mean (-1, -2)
        tensor([[ 1., -2.],
                [-2.,  4.]])
    """

    def __init__(
        self, objective: Objective, *, per: Per = "sequence", unbiased: bool = False, block: Block | None = None
    ) -> None:
        super().__init__(objective, per=per, block=block)
        self.unbiased = unbiased
        self._moments: _Moments | None = None
        self._point: tuple[Any, ...] | None = None

    def products(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        self._update_moments()
        return super().products(*args, **kwargs)

    def timed(self, x: Tensor) -> tuple[Tensor, float, float]:
        self._update_moments()
        return super().timed(x)

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        assert self._moments is not None
        moments = self._moments
        g = moments.gradient if block is None else block.take(moments.gradient)
        along = (X @ g) * (moments.share(lin) / moments.total**2)
        part = torch.addr(super()._of_batch(lin, X, block), along, g, alpha=-1)
        return part if moments.factor == 1.0 else moments.factor * part

    def _update_moments(self) -> None:
        """Compute what the products share, once at every point."""
        point = self.objective._evaluator.fingerprint()
        if self._moments is None or self._point != point:
            self._moments, self._point = _Moments(self.objective, self.per, self.unbiased), point


class _Moments:
    """The mean of the gradients, and sums over the weights of all examples."""

    def __init__(self, objective: Objective, per: Per, unbiased: bool) -> None:
        rule = objective._rule
        self._sums = rule is not None and rule.reduction == "sum"
        self._per: Per = per
        self.gradient = objective.gradient()
        self.total, self.factor = 1.0, 1.0  # of the weights; of the estimate
        if self._sums or unbiased:
            sums = objective.reduce(self._sums_of_batch)
            whole = 1.0 if objective.sums else objective.total_weight
            self.total = float(sums[0])
            concentration = float(sums[1]) / (whole * self.total**2)  # sum_i p_i^2, with p_i made to add up to 1
            if unbiased and 1 - concentration <= 100 * torch.finfo(torch.float64).eps:
                raise InputError("the unbiased covariance needs at least two examples with a weight; drop unbiased=.")
            self.factor = 1 / (1 - concentration) if unbiased else 1.0

    def share(self, lin: Linearization) -> Tensor | float:
        """Return what the shares of the batch's examples add up to."""
        return self._shares(lin).sum().to(self.gradient.dtype) if self._sums else 1.0

    def _shares(self, lin: Linearization) -> Tensor:
        return example_shares(lin.batch_outputs(), self._per)

    def _sums_of_batch(self, lin: Linearization) -> Tensor:
        shares = self._shares(lin)
        return torch.stack([shares.sum(), lin.weight * shares.square().sum()])
