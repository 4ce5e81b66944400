"""The exact Fisher matrix of an objective."""

from __future__ import annotations

from curvature.arguments import checked
from curvature.objective.objective import Objective
from curvature.operators._objective_operator import ObjectiveOperator, check_likelihood
from curvature.parameters import Block


class FisherOperator(ObjectiveOperator):
    """F = sum_t c_t J_t' E[s s'] J_t / W, with s the gradient of -log p(y | z_t) in the outputs, y ~ p(y | z_t).

    The sum runs over the targets t (examples, tokens, entries of a regression) of all batches, with outputs z_t and
    their Jacobian J_t; W is what the loss divides by (1 for `reduction="sum"`), and c_t how the loss weights a
    log-likelihood:

    - cross-entropy: p = softmax(z), E[s s'] = diag p - p p'. c_t is 0 for an ignored target, else the class weight of
      the target or 1; with soft targets q, from class probabilities or label smoothing, sum_c weight_c q_c.
    - binary cross-entropy with logits: every entry is a target, E[s s'] = p (1 - p), p = sigmoid(z);
      c_t = weight * (pos_weight * y + 1 - y).
    - squared error: every entry is a target, y is normal around z with variance 1/2, E[s s'] = 2, c_t = 1. For another
      noise variance v, F is to be divided by 2 v.

    The Hessian of -log p in z does not depend on y here and equals E[s s']: F is the Gauss-Newton matrix, number for
    number, and computed as such, without sampling. `MCFisherOperator` estimates it; `EmpiricalFisherOperator` takes the
    data's own targets and is another matrix. Losses of unknown distribution are refused.

    Cost of one product: 4/3 gradients at best with the graph kept, as for `GGNOperator`.

    Args:
        objective: one with cross-entropy, squared error or binary cross-entropy with logits.
        block: restricts the matrix to some parameters: F_BB, the diagonal block. See `restrict`.

    Raises:
        InputError: if the objective has no split between model and loss, or another loss.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method; Kunstner, Balles and Hennig
    (2019), Limitations of the empirical Fisher approximation.

    Examples:
        >>> import torch
        >>> from curvature import FisherOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> FisherOperator(Objective(model, torch.nn.MSELoss(), (x, torch.ones(2, 1)))).to_dense()  # (2 / N) x'x
        tensor([[1., 0.],
                [0., 4.]])
    """

    _product = "ggnvp"

    @checked
    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        check_likelihood(objective, "the Fisher matrix")
        super().__init__(objective, block)
