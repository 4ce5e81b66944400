"""Checks of the arguments of an objective."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvature.errors import InputError

__all__ = ["check_arguments"]


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
