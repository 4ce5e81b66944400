"""The third derivative of a loss along directions: how curvature changes from point to point."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.objective.dependence import Dependence
from curvature.objective.objective import Objective

__all__ = ["curvature_gradient"]


@full_precision
def curvature_gradient(objective: Objective, v: Tensor) -> Tensor:
    """Return the gradient (n,) of v'H(theta)v in theta, v held fixed: the third derivative T(v, v, .).

    For a unit eigenvector v of a simple eigenvalue it is the gradient of that eigenvalue (first-order perturbation):
    its product with a direction d is the rate at which the eigenvalue changes along d. It is exact up to rounding;
    where the loss is smooth in pieces only (ReLU, max-pooling), it is that of the piece the point lies in.

    Cost: a gradient and three more backward passes, about 6 gradients; graphs are built anew, and given up.

    Args:
        objective: the loss, twice differentiable operations of which must be so a third time.
        v: (n,).

    Raises:
        InputError: for v of another shape, or an operation without a third derivative.
        DataError: if no batch counts.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> x = torch.ones(1, 1)
        >>> objective = Objective(model, None, [x], forward=lambda model, x: model(x).sum() ** 3, weight=len)
        >>> curvature_gradient(objective, torch.tensor([2.0]))  # of 2 (6 w) 2
        tensor([24.])
    """
    if tuple(v.shape) != (objective.num_params,):
        raise InputError(f"v must be of shape ({objective.num_params},), got {tuple(v.shape)}.")

    def parts() -> Iterator[tuple[float, Tensor]]:
        for index, batch in enumerate(objective.batches()):
            lin = objective.linearise(batch, index, third_order=True)
            dependence.note(lin)
            yield lin.weight, lin.curvature_gradient(v)
        dependence.require()

    dependence = Dependence(objective.dependence.whole)

    return objective.mean(parts())
