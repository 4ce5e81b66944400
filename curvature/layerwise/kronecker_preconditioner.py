"""The inverse of a damped block-diagonal matrix of Kronecker products, from the eigenvectors of the factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linop import SymmetricOperator

if TYPE_CHECKING:
    from curvature.layerwise.kronecker import KroneckerFactors

__all__ = ["KroneckerPreconditioner"]


class KroneckerPreconditioner(SymmetricOperator):
    """P = blockdiag(B (x) A) + damping I, as its inverse: `@` applies P^-1.

    With B = U b U' and A = V a V', P^-1 X = U ((U'XV) / (b a' + damping)) V' for a layer's X (o, i + 1): the damping is
    that of the whole block, not shared out over the factors. Parameters without factors are divided by the damping.
    Eigenvalues of factors below zero, which is rounding, count as zero. Cost: o^3 + i^3 a layer once, 2 o i (o + i) a
    column.

    Args:
        factors: as `kronecker_factors` returns them.
        damping: positive; that of the system to be solved.

    Raises:
        InputError: for a damping that is not positive and finite.

    Reference: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    appendix B.
    """

    def __init__(self, factors: KroneckerFactors, *, damping: float) -> None:
        if not (damping > 0 and math.isfinite(damping)):
            raise InputError(f"damping must be positive and finite, got {damping}: blocks may be singular.")
        some = next(iter(factors.layers.values())).A
        n = factors.num_params
        super().__init__((n, n), torch.promote_types(some.dtype, torch.float32), some.device)
        self.damping = damping
        self._blocks = []
        for f in factors.layers.values():
            (a, V), (b, U) = (torch.linalg.eigh(M.to(self.dtype)) for M in (f.A, f.B))
            places = [torch.arange(*factors.slices[name]) for name in (f.weight, f.bias) if name is not None]
            index = torch.cat([p.view(len(b), -1) for p in places], dim=1).to(some.device)  # of the rows of [W b]
            spread = b.clamp_min(0)[:, None] * a.clamp_min(0) + damping
            self._blocks.append((index, U, V, spread))

    def _matmat(self, X: Tensor) -> Tensor:
        columns = X.T.to(self.dtype)
        result = columns / self.damping
        for index, U, V, spread in self._blocks:
            part = U @ ((U.T @ columns[:, index] @ V) / spread) @ V.T
            result[:, index.reshape(-1)] = part.flatten(1)
        return result.T
