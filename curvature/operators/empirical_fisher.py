"""The second moment of single examples' gradients."""

from __future__ import annotations

from curvature.objective import Objective
from curvature.operators._objective_operator import MetricOperator, check_split
from curvature.output_metrics import LossGradients, Per
from curvature.parameters import Block

__all__ = ["EmpiricalFisherOperator"]


class EmpiricalFisherOperator(MetricOperator):
    """E = sum_i p_i g_i g_i', g_i the gradient of example i's loss; symmetric and positive semi-definite.

    l_i is the mean loss over the example's terms, w_i their number (the sum of their class weights), and p_i = w_i / W
    with W = sum_i w_i over all batches: sum_i p_i l_i = L and sum_i p_i g_i is the gradient of L, exactly. Ignored
    targets have no weight. A user's `weight=` scales the p_i of a whole batch. With `reduction="sum"` L and E are W
    times what they are for the mean, that is p_i = w_i.

    What one example is, `per` says: a sequence is everything under one index of the first dimension (an image, a text
    with all its tokens), a target is one loss term (a token, a pixel, an entry of a regression). Both are the same
    where examples have one term each.

    Other than `FisherOperator` the targets are those of the data, and other than its relatives E does not approach the
    Hessian at a minimum: with g_i of noise it is noise. E = Sigma + g g' with Sigma the covariance of gradients
    (`GradientCovarianceOperator`), and its trace is the mean of |g_i|^2.

    No gradient of a single example is formed: with d_i the part of the gradient of the batch's loss in the outputs that
    belongs to example i, a batch's matrix is J' diag_i(d_i d_i' / p_i) J. Examples that are coupled by the model (batch
    normalisation in train mode) have gradients all the same, through all outputs.

    Cost of one product: that of `GGNOperator`, 4/3 gradients at best with the graph kept.

    Args:
        objective: one with `loss=`, any whose loss is a sum over examples, whose targets are one tensor.
        per: "sequence" or "target".
        block: restricts the matrix to some parameters; see `restrict`.

    Raises:
        InputError: if the objective has no split between model and loss; with the first product, if the loss couples
            examples by its second derivative or its terms cannot be told apart.

    Reference: Kunstner, Hennig and Balles (2019), Limitations of the empirical Fisher approximation; Thomas et al.
    (2020), On the interplay between noise and curvature.

    Example:
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

    def __init__(self, objective: Objective, *, per: Per = "sequence", block: Block | None = None) -> None:
        check_split(objective, "the empirical Fisher matrix")
        super().__init__(objective, LossGradients(per), block)
        self.per = per
