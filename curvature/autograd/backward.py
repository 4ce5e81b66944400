"""Backward passes through graphs that are kept, and a walk over such graphs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

from curvature.errors import CheckFailedError

__all__ = [
    "End",
    "differentiable",
    "dtypes_of_graph",
    "ends_of",
    "joined",
    "no_autocast",
    "pull_back",
    "refuse_checkpointing",
    "walk",
]

End: TypeAlias = Tensor | GradientEdge
"""Where a graph ends: with its tensor, or without."""
_End = TypeVar("_End", bound=End)
_REFUSAL = re.compile(r"derivative for '?([\w:]+)'? is not implemented")


def pull_back(
    functions: Sequence[End],
    inputs: Sequence[End],
    vectors: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return sum_i vectors_i' d functions_i / d inputs, None where there is no dependence.

    This is `torch.autograd.grad`, called past its dispatch to function modes: that dispatch would switch our own mode
    off inside, and layers that activation checkpointing records again in the backward pass would be recorded otherwise.
    """
    if vectors is None:
        vectors = [torch.ones_like(cast(Tensor, f)) for f in functions]
    try:
        return _engine_run_backward(
            tuple(functions),
            tuple(vectors),
            retain_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )
    except RuntimeError as error:
        refuse_checkpointing(error)
        found = _REFUSAL.search(str(error))
        if found is None:
            raise
        name = found[1].removeprefix("aten::").strip("_").removesuffix("_backward")
        raise CheckFailedError(
            f"torch has no second derivative of {name}, which Hessian, Gauss-Newton and Fisher products all need: "
            "write that operation of the model or loss in others that torch differentiates twice; gradients and "
            "per-example gradients work as it is."
        ) from error


def refuse_checkpointing(error: Exception) -> None:
    """Say what stands behind an error of activation checkpointing; do nothing about another one.

    Raises:
        CheckFailedError: with what to do.
    """
    if type(error).__name__ == "CheckpointError":
        raise CheckFailedError(
            "activation checkpointing ran a part of the model once more, and it recorded other tensors than before (a "
            "forward pass that differentiates itself?): switch checkpointing off for this model."
        ) from error
    if isinstance(error, RuntimeError) and "use_reentrant=True" in str(error):
        raise CheckFailedError(
            "the model holds torch.utils.checkpoint with use_reentrant=True, whose parameters get derivatives in "
            ".grad only; pass use_reentrant=False (gradient_checkpointing_kwargs in Hugging Face), or switch it off."
        ) from error


def joined(gradients: Sequence[Tensor | None], params: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return gradients of parameters as one vector, zeros where there is none; by default of float32 or wider."""
    dtype = torch.promote_types(params[0].dtype, torch.float32) if dtype is None else dtype
    pairs = zip(gradients, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).reshape(-1).to(dtype) for g, p in pairs])


def differentiable(functions: Sequence[_End | None], vectors: Sequence[Tensor]) -> tuple[list[_End], list[Tensor]]:
    """Drop the entries that do not depend on anything: their derivative is zero."""
    ends: list[_End] = []
    kept: list[Tensor] = []
    for f, v in zip(functions, vectors, strict=True):
        if f is not None and (isinstance(f, GradientEdge) or f.requires_grad):
            ends.append(f)
            kept.append(v)
    return ends, kept


def ends_of(functions: Sequence[Tensor | None]) -> list[End | None]:
    """Return what a backward pass begins with, without the memory of tensors that it does not need."""
    return [get_gradient_edge(f) if f is not None and f.requires_grad else f for f in functions]


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Backward passes run in the dtypes that the forward pass recorded, whatever autocast surrounds them."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # entering autocast costs as much as a small layer
    return torch.autocast(device.type, enabled=False)


def walk(roots: Sequence[Any]) -> Iterator[Any]:
    """Walk autograd's graph from some of its nodes."""
    seen, stack = set(), [node for node in roots if node is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += [parent for parent, _ in node.next_functions if parent is not None]


def dtypes_of_graph(roots: Sequence[Any]) -> set[torch.dtype]:
    """Return the floating dtypes of what a graph passes on."""
    found = {entry.dtype for node in walk(roots) for entry in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point}
