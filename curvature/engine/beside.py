"""What a loss depends on beside the outputs that it compares with targets.

Gauss-Newton and Fisher matrices, and gradients in the outputs, are made of the loss as a function of the outputs alone.
Targets that the model makes and penalties inside the loss have a part in its derivatives that they would leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvature.data.tensors import tensors_in
from curvature.errors import InputError

__all__ = ["leaves_beside", "refuse_what_is_beside"]


def leaves_beside(ends: Iterable[Tensor], outputs: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the leaves that tensors depend on by ways that do not go through the outputs."""
    through = None if outputs is None or not outputs.requires_grad else tuple(get_gradient_edge(outputs))[:2]
    stack: list[Any] = [tuple(get_gradient_edge(end))[:2] for end in ends if end.requires_grad]
    seen = set[Any]()
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or node in seen or edge == through:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += node.next_functions


def refuse_what_is_beside(loss: Tensor, outputs: Tensor, targets: Any, params: Sequence[Tensor]) -> None:
    """Refuse a loss that depends on parameters by other ways than as a function of the outputs.

    Raises:
        InputError: with the way and the remedy.
    """
    own = {id(p) for p in params}
    if any(id(leaf) in own for leaf in leaves_beside(tensors_in(targets))):
        raise InputError(
            "the targets depend on the parameters, and Gauss-Newton and Fisher matrices are those of targets held "
            "fixed: detach them in forward, or make them of the outputs inside loss=. Hessian and gradient take them "
            "as they are."
        )
    if any(id(leaf) in own for leaf in leaves_beside([loss], outputs)):
        raise InputError(
            "the loss depends on the parameters beside the outputs (a penalty inside it?), and Gauss-Newton and Fisher "
            "matrices would leave that part out: take it out of loss= and add its own matrix, or use the Hessian."
        )
