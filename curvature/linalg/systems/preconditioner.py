"""Diagonal preconditioners: the cheapest change of variables."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linop import SymmetricOperator


class DiagonalPreconditioner(SymmetricOperator):
    """P = diag(d + damping)^power, as its inverse: `@` applies P^-1.

    With d the diagonal of A it is Jacobi's preconditioner, which is within a factor n of the best diagonal one
    (van der Sluis, 1969); Martens (2010) takes the sums of squared per-example gradients and power 3/4.

    Args:
        diagonal: d, (n,), e.g. `A.diagonal()` or the values of a `DiagonalEstimate`.
        damping: added to d; that of the system to be solved.
        power: at most 1; smaller ones trust d less.

    Raises:
        InputError: unless d + damping is positive and finite, as estimates of a diagonal may fail to be.

    Examples:
        >>> P = DiagonalPreconditioner(torch.tensor([1.0, 3.0]), damping=1.0)
        >>> P @ torch.ones(2)
        tensor([0.5000, 0.2500])
    """

    @checked
    def __init__(self, diagonal: Tensor, *, damping: float = 0.0, power: float = 1.0) -> None:
        if diagonal.ndim != 1 or len(diagonal) == 0 or not diagonal.dtype.is_floating_point:
            raise InputError(
                f"diagonal must be a real vector (n,), got shape {tuple(diagonal.shape)}, {diagonal.dtype}."
            )
        if not 0 < power <= 1:
            raise InputError(f"power must be in (0, 1], got {power}.")
        d = diagonal.detach().to(torch.promote_types(diagonal.dtype, torch.float32)) + damping
        if not bool(((d > 0) & d.isfinite()).all()):
            raise InputError(
                f"diagonal + damping must be positive and finite, got entries down to {float(d.min()):.2g}; clamp "
                "them, or raise damping."
            )
        super().__init__((len(d), len(d)), d.dtype, d.device)
        self.inverse = d**-power

    def _matmat(self, X: Tensor) -> Tensor:
        return self.inverse[:, None] * X
