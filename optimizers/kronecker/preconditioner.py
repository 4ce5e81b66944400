"""K-FAC as a preconditioner of damped Gauss-Newton systems: factors averaged over steps, damping of the present one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.linop import SymmetricOperator
from optimizers.kronecker.factors import State, solve
from optimizers.kronecker.layers import Layer
from optimizers.newton.flat import FlatParams

__all__ = ["LayerPreconditioner"]


class LayerPreconditioner(SymmetricOperator):
    """P = blockdiag(L (x) R) + damping I, as its inverse; a diagonal for parameters without factors.

    Cost: 4 o i (o + i) multiplications a layer and vector.

    Args:
        flat: some parameters.
        layers: those that lie among them, by places in `flat`.
        states: of every parameter of `flat`: bases and `spread` of a layer's main one, `diagonal` of one without.
        damping: that of the system.
    """

    def __init__(self, flat: FlatParams, layers: Sequence[Layer], states: Sequence[State], damping: float) -> None:
        super().__init__((flat.n, flat.n), flat.dtype, flat.device)
        self.flat, self.layers, self.states, self.damping = flat, list(layers), list(states), damping

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.stack([self._vector(x) for x in X.T], dim=1)

    def _vector(self, x: Tensor) -> Tensor:
        parts = list(x.split(self.flat.sizes))
        covered = {i for layer in self.layers for i in layer.members}
        for i, state in enumerate(self.states):
            if i not in covered:
                parts[i] = parts[i] / (state["diagonal"].reshape(-1).clamp(min=0) + self.damping)
        for layer in self.layers:
            state = self.states[layer.main]
            groups, rows = state["left"].shape[:2]
            matrices = [parts[i].view(groups, rows, -1) for i in layer.members]
            solved = solve(torch.cat(matrices, 2), state, self.damping)
            pieces = solved.split([m.shape[2] for m in matrices], dim=2)
            for i, piece in zip(layer.members, pieces, strict=True):
                parts[i] = piece.reshape(-1).to(self.dtype)
        return torch.cat(parts)
