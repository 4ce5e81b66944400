"""Where a graph curves, and how much: what the Hessian's diagonal has beyond that of the Gauss-Newton matrix.

With g the gradient of the loss in the output of a node, J the Jacobian of its inputs z in the parameters and z -> s(z)
what it computes, the Hessian is the sum over all nodes

    H = sum_nodes J' (d^2 s(z) . g) J.

Linear functions add nothing to it, functions s of single entries add J' diag(s''(z) g) J, and products whose factors
depend on different parameters add nothing to its diagonal. A model made of these has an exact diagonal in columns.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.autograd.backward import pull_back
from curvature.layerwise.loss_root import UnsupportedError

__all__ = ["Bend", "bends", "meeting_in_products"]

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
_ADDED = {
    **dict.fromkeys(["Addmm", "Addmv", "Addbmm", "Addcmul", "Baddbmm"], 0),
    **dict.fromkeys(["Linear", "Convolution", "MkldnnConvolution", "SlowConvTranspose2D"], 2),
    **dict.fromkeys(["NativeBatchNorm", "CudnnBatchNorm"], 2),
}
"""Place of the operand that is added to a product of the others."""
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
    curved: list[Any] = []
    for node, name, sets in _functions(outputs, lambda variable: id(variable)):
        operands = [leafs for (parent, _), leafs in zip(node.next_functions, sets, strict=True) if parent is not None]
        kind = _KINDS.get(name)
        if kind == 2 and len(operands) == 1:
            curved.append(node)
        elif kind == 1 and not getattr(node, "_saved_training", False):  # as in statistics of a batch
            if _meeting(operands):
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


def meeting_in_products(outputs: Tensor, groups: Sequence[Collection[Tensor]]) -> set[int]:
    """Return which groups of parameters two factors of one product depend on, in a graph of which `bends` is known.

    Where none of its parameters meet, the diagonal block of a group is made of columns as the diagonal is.
    """
    group_of = {id(tensor): i for i, group in enumerate(groups) for tensor in group}
    places: dict[Any, int] = {}
    met = 0
    for _, name, sets in _functions(outputs, lambda variable: group_of.get(id(variable)), places):
        if _KINDS.get(name) == 1:
            added = _ADDED.get(name)
            met |= _meeting([leafs for i, leafs in enumerate(sets) if i != added])
    return {group for group, place in places.items() if group is not None and met >> place & 1}


def _functions(
    outputs: Tensor, key: Callable[[Tensor], Any], places: dict[Any, int] | None = None
) -> Iterator[tuple[Any, str, list[int]]]:
    """Yield every function behind a tensor, those that it is a function of first, with its name.

    With it come the parameters that each operand depends on, as bits; those of one key share one, which `places` says.
    """
    places = {} if places is None else places
    below: dict[Any, int] = {None: 0}
    stack: list[Any] = [] if outputs.grad_fn is None else [outputs.grad_fn]
    while stack:
        node = stack[-1]
        operands = [parent for parent, _ in node.next_functions]
        missing = [parent for parent in operands if parent not in below]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node in below:
            continue
        if hasattr(node, "variable"):
            below[node] = 1 << places.setdefault(key(node.variable), len(places))
            continue
        sets = [below[parent] for parent in operands]
        below[node] = functools.reduce(operator.or_, sets, 0)
        found = re.fullmatch(r"(\w+)Backward\d+", type(node).__name__)  # those of user functions have no number
        yield node, found[1] if found else type(node).__name__, sets


def _meeting(sets: Sequence[int]) -> int:
    """Return the bits that two of the sets have in common."""
    met = seen = 0
    for leafs in sets:
        met |= seen & leafs
        seen |= leafs
    return met
