"""The Hessian of an objective."""

from __future__ import annotations

from curvature.operators._objective_operator import ObjectiveOperator


class HessianOperator(ObjectiveOperator):
    """H = sum_b w_b H_b / sum_b w_b, with H_b the Hessian of batch b's loss in the chosen parameters; symmetric.

    Cost of one product: 2 gradients at best with the graph kept, about 4 to 5 with the graph rebuilt. A block of k
    columns walks the data once.

    Reference: Pearlmutter (1994), Fast exact multiplication by the Hessian.

    Args:
        objective: the function; it needs a second derivative (piecewise linear activations have one almost everywhere).
        block: restricts the matrix to some parameters: H_BB, the diagonal block. See `restrict`.

    Examples:
        >>> import torch
        >>> from curvature import HessianOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> HessianOperator(objective).to_dense()  # (2 / N) x'x
        tensor([[1., 0.],
                [0., 4.]])
    """

    _product = "hvp"
