"""Checks of the arguments of an objective."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from curvature.errors import InputError

__all__ = ["check_arguments", "head_of"]


def check_arguments(
    model: Any, loss: Any, forward: Any, keep_graphs: Any, memory_budget: Any, micro_batch: Any
) -> None:
    """Refuse what an objective cannot be made of.

    Raises:
        InputError: for arguments out of range or of the wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if loss is None and forward is None:
        raise InputError(
            "loss=None needs a forward(model, batch) that returns the scalar loss itself; pass loss= or forward=."
        )
    if keep_graphs not in (True, False, "auto"):
        raise InputError(f"keep_graphs must be True, False or 'auto', got {keep_graphs!r}.")
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory_budget must be a number of bytes >= 0, got {memory_budget}.")
    if micro_batch is not None and micro_batch < 1:
        raise InputError(f"micro_batch must be at least 1, got {micro_batch}.")


@dataclass(frozen=True)
class _Weight:
    """The weight of a model's last linear layer as it is now: layers and parameters may be replaced."""

    model: nn.Module
    name: str | None
    """None asks the model."""

    def __call__(self) -> Any:
        if self.name is None:
            with contextlib.suppress(NotImplementedError, AttributeError, TypeError):  # a model without a head
                return getattr(self.model.get_output_embeddings(), "weight", None)  # type: ignore[operator] # a method
            return None
        return self.model.get_submodule(self.name).weight


def head_of(model: nn.Module, head: nn.Module | str | None) -> _Weight | None:
    """Return what finds the weight of the last linear layer; None where there is none.

    Raises:
        InputError: if it is no linear layer of the model.
    """
    if head is None:
        return None
    if isinstance(head, str) and head == "auto":
        return _Weight(model, None) if callable(getattr(model, "get_output_embeddings", None)) else None
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if name == head or module is head]
    if not names:
        shown = repr(head) if isinstance(head, str) else f"a {type(head).__name__} that the model does not hold"
        raise InputError(f"head must be a module of the model, its name, 'auto' or None, got {shown}.")
    weight = getattr(modules[names[0]], "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"head must be a linear layer with a weight (classes, inputs), got {names[0]!r} without one.")
    return _Weight(model, names[0])
