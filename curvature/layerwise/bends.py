"""Where a graph curves, and how much: what the Hessian's diagonal has beyond that of the Gauss-Newton matrix.

With g the gradient of the loss in the output of a node, J the Jacobian of its inputs z in the parameters and z -> s(z)
what it computes, the Hessian is the sum over all nodes

    H = sum_nodes J' (d^2 s(z) . g) J.

Linear functions add nothing to it, functions s of single entries add J' diag(s''(z) g) J, and products whose factors
depend on different parameters add nothing to its diagonal. A model made of these has an exact diagonal in columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.autograd.backward import pull_back
from curvature.layerwise.loss_root import UnsupportedError

__all__ = ["Bend", "bends"]

_LINEAR = """
Add Sub Neg Sum Mean Cat Stack Expand Repeat View UnsafeView ReshapeAlias Transpose Permute T Squeeze Unsqueeze Select
Slice Split SplitWithSizes Narrow Unfold Index IndexSelect Gather Clone ToCopy Alias AsStrided Where MaskedFill
Embedding ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D Roll Flip
AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D UpsampleNearest2D UpsampleBilinear2D
MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D Max Min Amax Amin Maximum Minimum
Relu LeakyRelu Threshold Hardtanh Clamp ClampMin ClampMax Abs Hardsigmoid Hardshrink Softshrink NativeDropout
"""  # piecewise linear functions among them
_PRODUCTS = """
Mul Mm Mv Dot Bmm Baddbmm Addmm Addmv Addbmm Addcmul Linear Convolution MkldnnConvolution SlowConvTranspose2D
PreluKernel NativeBatchNorm CudnnBatchNorm
"""
_ENTRYWISE = """
Tanh Sigmoid LogSigmoid Elu Selu Celu Gelu Silu Mish Softplus Hardswish Exp Expm1 Log Log1P Sqrt Rsqrt Reciprocal Sin
Cos Atan Asinh Erf Sinh Cosh Pow
"""
_KINDS = {name: kind for kind, names in enumerate((_LINEAR, _PRODUCTS, _ENTRYWISE)) for name in names.split()}


@dataclass(frozen=True)
class Bend:
    """A function of single entries."""

    edge: GradientEdge
    """Of its input z."""
    second: Tensor
    """s''(z) g, in the shape of z."""

    def columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the columns of the root of |s'' g|, one entry of every example each, and the signs (N,)."""
        flat = self.second.flatten(1)
        for k in flat.any(0).nonzero()[:, 0].tolist():
            column = torch.zeros_like(flat)
            column[:, k] = flat[:, k].abs().sqrt()
            yield column.view_as(self.second), flat[:, k].sign()


def bends(outputs: Tensor, loss: Tensor) -> list[Bend]:
    """Return the places where the graph from the parameters to a batch's outputs curves.

    Raises:
        UnsupportedError: at functions that are none of the three kinds, with the name of the first.
    """
    if outputs.grad_fn is None:
        return []
    below: dict[Any, int] = {}  # the leaves that a node depends on, a bit each
    leaves: dict[Any, int] = {}
    curved: list[Any] = []
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack[-1]
        operands = [parent for parent, _ in node.next_functions if parent is not None]
        missing = [parent for parent in operands if parent not in below]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node in below:
            continue
        sets = [below[parent] for parent in operands]
        below[node] = 0
        for leafs in sets:
            below[node] |= leafs
        if hasattr(node, "variable"):
            below[node] = 1 << leaves.setdefault(node, len(leaves))
            continue
        found = re.fullmatch(r"(\w+)Backward\d+", type(node).__name__)  # those of user functions have no number
        name = found[1] if found else type(node).__name__
        kind = _KINDS.get(name)
        if kind == 2 and len(operands) == 1:
            curved.append(node)
        elif kind == 1 and not getattr(node, "_saved_training", False):  # as in statistics of a batch
            if sum(leafs.bit_count() for leafs in sets) > below[node].bit_count():
                raise UnsupportedError(f"factors of a product ({name}) depend on the same parameters")
        elif kind != 0 and not (name == "Div" and node.next_functions[1][0] is None):
            raise UnsupportedError(f"{name} is neither linear, a product, nor a function of single entries")
    if not curved:
        return []
    gradients = pull_back([loss], [GradientEdge(node, 0) for node in curved])
    places = []
    for node, g in zip(curved, gradients, strict=True):
        edge = GradientEdge(*next(pair for pair in node.next_functions if pair[0] is not None))
        if g is None:
            continue
        with torch.enable_grad():
            first = node(g)
        first = next(t for t in first if t is not None) if isinstance(first, tuple) else first
        (second,) = pull_back([first], [edge]) if first.requires_grad else (None,)
        if second is not None and second.shape != g.shape:
            raise UnsupportedError(f"{type(node).__name__} broadcasts")
        if second is not None:
            places.append(Bend(edge, second.detach()))
    return places
