"""Batches that are objects with tensors among their attributes: data classes, graphs, records of one's own."""

from __future__ import annotations

import types
import weakref
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import nn

__all__ = ["attributes_of"]

_PLAIN = (
    *(str, bytes, bytearray, Number, Enum, type(None), type, torch.dtype, torch.device, torch.Generator, nn.Module),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, weakref.ReferenceType),
)


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, in slots or not; none of what is a value, a function or a module."""
    if isinstance(value, _PLAIN):
        return {}
    found = {}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return {**found, **getattr(value, "__dict__", {})}
