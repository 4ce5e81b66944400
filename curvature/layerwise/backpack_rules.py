"""BackPACK's extensions by what they leave on parameters, with rules of our own where it has none.

Nothing but `curvature.layerwise.backpack_session` imports this: BackPACK is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.embedding import EmbeddingDerivatives
from backpack.extensions import KFLR, KFRA, BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian, SumGradSquared
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.diag_hessian.diag_h_base import DiagHBaseModule
from torch import Tensor, nn

from curvature.layerwise.support import Leaves

__all__ = ["EXTENSIONS", "RootRule", "SignedRootRule"]


class _LinearMap(DiagHBaseModule):
    """Rule for the Hessian's diagonal in layers that are linear in inputs and in parameters, which BackPACK lacks."""

    def __init__(self, derivatives: BaseParameterDerivatives, params: list[str]) -> None:
        for name in params:
            setattr(self, name, partial(self._squares, name))
        super().__init__(derivatives, params=params)

    def _squares(self, name: str, _: Any, module: Any, g_inp: Any, g_out: Any, backproped: dict[str, Any]) -> Tensor:
        total = torch.zeros_like(getattr(module, name))
        for matrix, sign in zip(backproped["matrices"], backproped["signs"], strict=True):
            rows = self.derivatives.param_mjp(name, module, g_inp, g_out, matrix, sum_batch=False)
            total += sign * rows.square().sum((0, 1))
        return total


def _diag_hessian() -> DiagHessian:
    """Return BackPACK's extension with rules for batch normalisation in eval mode and embeddings."""
    extension = DiagHessian()
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        extension.set_module_extension(norm, _LinearMap(BatchNormNdDerivatives(), ["weight", "bias"]))
    extension.set_module_extension(nn.Embedding, _LinearMap(EmbeddingDerivatives(), ["weight"]))
    return extension


class RootRule(ModuleExtension):
    """Hands what stands for the loss Hessian, such as columns (k, N, ...) of its root, to BackPACK's rules."""

    def backpropagate(self, extension: Any, module: Any, g_inp: Any, g_out: Any, bpQuantities: Any) -> Tensor:  # noqa: ARG002
        handed: Tensor = module.root
        return handed


class SignedRootRule(ModuleExtension):
    """Hands the columns, by sign, to BackPACK's Hessian rules."""

    def backpropagate(self, extension: Any, module: Any, g_inp: Any, g_out: Any, bpQuantities: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"matrices": [c for c, _ in module.root], "signs": [s for _, s in module.root]}


EXTENSIONS: dict[Leaves, tuple[Callable[[], Any], type[ModuleExtension] | None]] = {
    "diag_ggn": (DiagGGNExact, RootRule),
    "diag_hessian": (_diag_hessian, SignedRootRule),
    "kflr": (KFLR, RootRule),
    "kfra": (KFRA, RootRule),
    "gradients": (BatchGrad, None),
    "squared_norms": (BatchL2Grad, None),
    "sum_of_squares": (SumGradSquared, None),
}
"""Extension, and the rule that stands in for that of the loss."""
