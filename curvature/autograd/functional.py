"""Calling a model with other tensors in place of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_with"]

_LISTS = ("_flat_weights", "_flat_weight_refs")


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """Return model(*args) with tensors in place of parameters, tied ones too, and leave the model as found.

    Recurrent layers of torch make the lists that they keep of their weights anew; they are given back the old ones.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    lists = [(vars(m), name, kept, list(kept)) for m in layers for name in _LISTS for kept in [vars(m)[name]]]
    try:
        return torch.func.functional_call(model, dict(tensors), args)
    finally:
        for attributes, name, kept, entries in lists:
            kept[:] = entries
            attributes[name] = kept
