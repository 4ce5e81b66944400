"""The second moment of single examples' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.engine.output_metrics import LossGradients, Per
from curvature.objective.objective import Objective
from curvature.objective.refusals import refuse_coupling
from curvature.operators._objective_operator import MetricOperator, check_split
from curvature.parameters import Block


class EmpiricalFisherOperator(MetricOperator):
    """E = sum_i p_i g_i g_i', g_i the gradient of example i's loss; symmetric and positive semi-definite.

    l_i is the mean loss over the example's terms, w_i their number (the sum of their class weights; 0 where ignored),
    and p_i = w_i / W with W = sum_i w_i over all batches, so that sum_i p_i g_i is the gradient of L. A user's
    `weight=` scales the p_i of a whole batch. With `reduction="sum"` g_i is the gradient of W l_i, and E is W^2 times
    what it is for the mean.

    `per` says what one example is: "example" everything under one index of the first dimension (an image, a text with
    all its tokens), "target" one loss term (a token, a pixel, an entry of a regression).

    The targets are those of the data, and E does not approach the Hessian at a minimum: with g_i of noise it is noise.
    E = Sigma + g g' with Sigma the covariance of gradients (`GradientCovarianceOperator`); its trace is the mean
    |g_i|^2.

    No gradient of a single example is formed: with d_i the part of the gradient of the batch's loss in the outputs that
    belongs to example i, a batch's matrix is J' diag_i(d_i d_i' / p_i) J. Examples that the model or the loss couples
    (batch normalisation in train mode, contrastive losses) have no gradient of their own.

    Cost of one product: that of `GGNOperator`, 4/3 gradients at best with the graph kept.

    Args:
        objective: one with `loss=`, any whose loss is a sum over examples, whose targets are one tensor.
        per: "example" or "target".
        block: restricts the matrix to some parameters; see `restrict`.

    Raises:
        InputError: if the objective has no split between model and loss; with the first product, if the loss couples
            targets by its second derivative or its terms cannot be told apart.
        DataError: with the first product, if examples are coupled, which cutting a batch in two shows.

    Reference: Kunstner, Balles and Hennig (2019), Limitations of the empirical Fisher approximation; Thomas et al.
    (2020), On the interplay between noise and curvature.

    Examples:
        >>> import torch
        >>> from curvature import EmpiricalFisherOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.ones(2, 1)))
        >>> EmpiricalFisherOperator(objective).to_dense()  # gradients (-2, 0) and (0, -4)
        tensor([[2., 0.],
                [0., 8.]])
    """

    _works_by_module = False  # coupling of examples is tested on whole parameters

    @checked
    def __init__(self, objective: Objective, *, per: Per = "example", block: Block | None = None) -> None:
        check_split(objective, "the empirical Fisher matrix")
        super().__init__(objective, LossGradients(per), block)
        self.per = per
        self._sums: tuple[float, float] | None = None
        self._point: object = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sums": None, "_point": None}  # copies find them anew

    def products(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        self._before_walk()
        return super().products(*args, **kwargs)

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        part = super()._of_batch(lin, X, block)
        refuse_coupling(self.objective, lin.batch, lin.index)
        return part if self._sums is None else self._sums[0] * part

    @property
    def _adds_up(self) -> bool:
        rule = self.objective.rule
        return rule is not None and rule.reduction == "sum"

    def _before_walk(self) -> None:
        """Count what a product needs to know of all batches."""
        self._note_point()
        if self._adds_up and self._sums is None:
            self._sums = self._count()

    def _note_point(self) -> bool:
        """Forget what was counted at another point; say whether it is another."""
        point = self.objective.freshness.point()
        if point is self._point:
            return False
        self._sums, self._point = None, point
        return True

    def _count(self) -> tuple[float, float]:
        """Return W, and sum_i p_i^2; a mean has divided by W already, it is 1. Costs a pass over the data."""

        def of_batch(lin: Linearization) -> Tensor:
            shares = lin.example_shares(self.per)
            return torch.stack([shares.sum(), lin.weight * shares.square().sum()])

        total, squares = self.objective.reduce(of_batch).tolist()
        divisor = 1.0 if self.objective.is_sum else self.objective.total_weight  # of what `reduce` adds up
        return total, squares / (divisor * total**2)
