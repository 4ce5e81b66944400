"""Kronecker factors as the matrix of a brain surgeon, with a diagonal for parameters that have none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.layerwise import KroneckerFactors
from curvature.linop import SymmetricOperator

__all__ = ["KroneckerMatrix", "diagonal_of", "inverse_diagonal_of"]


class KroneckerMatrix(SymmetricOperator):
    """The block-diagonal matrix of Kronecker factors, and a diagonal for parameters without."""

    def __init__(self, factors: KroneckerFactors, rest: Tensor) -> None:
        some = next(iter(factors.layers.values())).A
        super().__init__((factors.num_params, factors.num_params), some.dtype, some.device)
        self.factors, self.rest = factors, rest

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.stack([self.factors.matvec(x) + self.rest * x for x in X.T], dim=1)


def diagonal_of(factors: KroneckerFactors) -> Tensor:
    """Return the diagonal of B (x) A for all layers, zeros for parameters without factors."""
    zeros = next(iter(factors.layers.values())).A.new_zeros(factors.num_params)
    return _by_layer(factors, lambda A, B: torch.outer(B.diagonal(), A.diagonal()), zeros)


def inverse_diagonal_of(factors: KroneckerFactors, damping: float, rest: Tensor) -> Tensor:
    """Return the diagonal of (B (x) A + damping I)^-1 for all layers, 1 / (rest + damping) for parameters without."""

    def of_layer(A: Tensor, B: Tensor) -> Tensor:
        (a, V), (b, U) = torch.linalg.eigh(A), torch.linalg.eigh(B)
        return U.square() @ (1 / (b.clamp_min(0)[:, None] * a.clamp_min(0) + damping)) @ V.square().T

    return _by_layer(factors, of_layer, 1 / (rest + damping))


def _by_layer(factors: KroneckerFactors, of_layer: Callable[[Tensor, Tensor], Tensor], result: Tensor) -> Tensor:
    for f in factors.layers.values():
        entries = of_layer(f.A, f.B)
        if f.weight is not None:
            inputs = entries[:, :-1] if f.bias is not None else entries
            result[slice(*factors.slices[f.weight])] = inputs.reshape(-1)
        if f.bias is not None:
            result[slice(*factors.slices[f.bias])] = entries[:, -1] if f.weight is not None else entries[:, 0]
    return result
