"""What autograd passes over in silence, found in its graph before it is differentiated once more.

Three things give wrong numbers without an error:

- a function whose backward is marked `once_differentiable`: what it returns is a constant to autograd, or an error that
  the engine never reaches where no parameter lies behind it;
- torch's layer normalisation and its batch normalisation by statistics of the batch: their double backward takes mean
  and variance for constants, so that third derivatives are wrong (torch 2.13);
- its fused weight normalisation, whose second derivative is wrong already.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, once_differentiable
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointFunction

from curvature.autograd.backward import walk
from curvature.errors import CheckFailedError

__all__ = ["custom_functions", "failing_operation", "refuse_reentrant", "refuse_undifferentiable"]

_MARKED = once_differentiable(lambda _: None).__code__  # the wrapper's code, the same for every marked function
_HARMLESS: set[type] = set()
"""Types of nodes that are neither: asking each for its name takes as long as a small layer."""
_NORMS = re.compile(r"(LayerNorm|BatchNorm)\w*BackwardBackward\d*$")


def refuse_undifferentiable(tensors: Iterable[Any], order: str = "second", *, of_gradients: bool = False) -> None:
    """Refuse tensors whose graph cannot be differentiated with a graph of its own, before that is done.

    Args:
        tensors: what is differentiated, or edges of the graph; what is neither is skipped.
        order: which derivatives of the model are asked for, for the message.
        of_gradients: the tensors are gradients with a graph, to be differentiated without one: only what autograd has
            left out of it already counts.

    Raises:
        CheckFailedError: with the operation and the remedy.
    """
    roots = [
        t.node if isinstance(t, GradientEdge) else t.grad_fn for t in tensors if isinstance(t, (Tensor, GradientEdge))
    ]
    marked, norms = set(), set()
    for node in walk(roots):
        if type(node) in _HARMLESS:
            continue
        name = node.name()
        if isinstance(node, BackwardCFunction):
            if not of_gradients and _is_marked(node):
                marked.add(name)
        elif name == "torch::autograd::Error":
            marked.add("")
        elif "Norm" in name and _is_wrong(node, name, of_gradients):
            norms.add(name.partition("Backward")[0])
        elif "Norm" not in name and type(node).__name__ == name:  # an operation with a type of its own
            _HARMLESS.add(type(node))
    if marked:
        names = ", ".join(sorted(filter(None, marked)) or custom_functions(roots))
        raise CheckFailedError(
            f"the model holds a function whose backward is marked once_differentiable ({names or 'name unknown'}), and "
            f"{order} derivatives differentiate it again. Write its backward in differentiable operations and drop the "
            "mark."
        )
    if norms:
        raise CheckFailedError(
            f"torch's {order} derivative of {', '.join(sorted(norms))} is wrong, and the model calls it where it "
            "cannot be replaced (TorchScript, a custom function, the closure of an optimizer). Write it in elementary "
            "operations there, (x - mean) / sqrt(var + eps)."
        )


def refuse_reentrant(loss: Tensor) -> None:
    """Refuse checkpoints whose backward pass adds to `.grad` of the parameters inside and returns nothing for them.

    Raises:
        CheckFailedError: with the remedy.
    """
    nodes = (node for node in walk([loss.grad_fn]) if isinstance(node, BackwardCFunction))
    if any(node._forward_cls is CheckpointFunction for node in nodes):  # type: ignore[attr-defined]
        raise CheckFailedError(
            "the model holds torch.utils.checkpoint with use_reentrant=True, whose parameters get derivatives in "
            ".grad only; pass use_reentrant=False (gradient_checkpointing_kwargs in Hugging Face), or switch it off."
        )


def custom_functions(roots: Iterable[Any]) -> list[str]:
    """Name the custom autograd functions in the graph behind some nodes."""
    return sorted({type(node).__name__ for node in walk(list(roots)) if isinstance(node, BackwardCFunction)})


def failing_operation(backward: Callable[[], Any]) -> str:
    """Name the operation that returns the first NaN in a backward pass; '' if none does (an infinity, say)."""
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        try:
            backward()
        except RuntimeError as error:
            found = re.search(r"Function '(\w+)' returned nan", str(error))
            return found[1] if found else ""
    return ""


def _is_marked(node: Any) -> bool:
    function = node._forward_cls
    backward = function.backward if function.vjp is Function.vjp else function.vjp
    return any(getattr(f, "__code__", None) is _MARKED for f in _wrapped(backward))


def _wrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_wrong(node: Any, name: str, of_gradients: bool) -> bool:
    if name.startswith("WeightNormInterfaceBackward"):
        return True
    # batch normalisation by running statistics is an affine map, and right to all orders
    return not of_gradients and _NORMS.search(name) is not None and bool(getattr(node, "_saved_train", True))
