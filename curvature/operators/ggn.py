"""The generalised Gauss-Newton matrix of an objective."""

from __future__ import annotations

from curvature.arguments import checked
from curvature.objective.objective import Objective
from curvature.operators._objective_operator import ObjectiveOperator, check_split
from curvature.parameters import Block


class GGNOperator(ObjectiveOperator):
    """G = sum_b w_b J_b' L_b J_b / sum_b w_b, J_b the Jacobian of batch b's outputs, L_b the loss Hessian in them.

    Symmetric, and positive semi-definite where the loss is convex in the outputs. It is the Hessian without the second
    derivatives of the model: equal to it where the model is linear in the parameters. L_b is applied in closed form for
    squared error, cross-entropy and binary cross-entropy with logits, and by autograd for any other loss. It is defined
    for a loss of the outputs alone: targets are held fixed, and a penalty inside the loss has no place in it.

    Cost of one product: 4/3 gradients at best with the graph kept. A block of k columns walks the data once.

    Args:
        objective: one with `loss=`, whose forward returns (outputs, targets) with outputs a tensor.
        block: restricts the matrix to some parameters: G_BB, the diagonal block. See `restrict`.

    Raises:
        InputError: if the objective has no split between model and loss; at the first product, if the loss depends on
            the parameters beside the outputs, through targets that are not detached or a penalty.

    Reference: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """

    _product = "ggnvp"

    @checked
    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        check_split(objective, "the Gauss-Newton matrix")
        super().__init__(objective, block)
