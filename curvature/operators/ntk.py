"""The neural tangent kernel of a model on the data of an objective."""

from __future__ import annotations

import copy

from torch import Tensor
from typing_extensions import Self

from curvature.arguments import checked
from curvature.linop import SymmetricOperator
from curvature.objective.objective import Objective
from curvature.objective.product_noise import product_noise
from curvature.operators.jacobian import JacobianOperator
from curvature.parameters import Block, Selection


class NTKOperator(SymmetricOperator):
    """K = J J', (M, M), with J the Jacobian of all M outputs on the data (`JacobianOperator`): the empirical NTK.

    Entry (i, j) is the inner product of the gradients of outputs i and j, rows in the order of the data. Symmetric and
    positive semi-definite; its eigenvalues other than zero are those of J'J, the Gauss-Newton matrix of the loss
    |z - y|^2 / 2 summed over all outputs. It is the smaller of the two where there are fewer outputs than parameters.

    Under gradient flow on |z - y|^2 / 2 the residual r = z - y moves by dr/dt = -K r.

    Cost of one product: one with J' and one with J, 4/3 gradients at best with the graph kept; two walks over the data.

    Args:
        objective: as for `JacobianOperator`.
        block: takes the derivatives in some parameters only, J_B J_B'; see `restrict`.

    Raises:
        InputError: as for `JacobianOperator`.
        DataError: if the loader shuffles.

    Reference: Jacot, Gabriel and Hongler (2018), Neural tangent kernel.

    Examples:
        >>> import torch
        >>> from curvature import NTKOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> NTKOperator(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))).to_dense()  # x x'
        tensor([[ 1.,  3.],
                [ 3., 25.]])
    """

    @checked
    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        self.jacobian = JacobianOperator(objective, block)
        M = self.jacobian.shape[0]
        super().__init__((M, M), objective.dtype, objective.device)

    def restrict(self, selection: Selection) -> Self:
        """Return the kernel of some parameters, J_B J_B': the kernels of disjoint blocks add up to the whole one."""
        restricted = copy.copy(self)
        restricted.jacobian = self.jacobian.restrict(selection)
        return restricted

    @property
    def product_noise(self) -> float:
        """Relative rounding error of a product; see `objective.product_noise`."""
        block = self.jacobian.block

        def product(objective: Objective, Z: Tensor) -> Tensor:
            kernel = NTKOperator(objective, block)
            return kernel @ Z[: kernel.shape[0]]  # of one batch

        key = (type(self), block and block.parameters)
        return product_noise(self.jacobian.objective, type(self).__name__, key, self.shape[0], product)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.jacobian @ (self.jacobian.T @ X)
