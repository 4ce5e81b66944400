"""The tensors of a batch, however it nests them: in containers, and among the attributes of objects."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attributes_of", "map_tensors", "move_batch", "ordinary", "tensors_in"]

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


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a nested batch, attributes of objects included, in the order of `map_tensors`."""
    return list(_tensors_below(batch, {}))


def _tensors_below(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value if isinstance(value, (list, tuple)) else value.values():
            if isinstance(part, Tensor):
                yield part
            else:
                yield from _tensors_below(part, seen)
    elif id(value) not in seen:
        seen[id(value)] = value  # kept alive, for its id is the key
        for part in attributes_of(value).values():
            yield from _tensors_below(part, seen)


def map_tensors(
    batch: Any,
    function: Callable[[Tensor], Tensor],
    whole: Callable[[Any], Any] | None = None,
    seen: dict[int, Any] | None = None,
) -> Any:
    """Return the same structure of tuples, lists, mappings and objects with `function` applied to its tensors.

    Objects are copied, not changed. `whole` returns what it makes of an object as one, or None.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    seen = {} if seen is None else seen
    as_one = None if whole is None else whole(batch)
    if as_one is not None:
        return as_one
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(value, function, whole, seen) for key, value in batch.items()}
        return mapped if type(batch) is dict else type(batch)(mapped)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        items = (map_tensors(value, function, whole, seen) for value in batch)
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if id(batch) in seen or not tensors_in(batch):
        return seen.get(id(batch), batch)
    seen[id(batch)] = changed = copy.copy(batch)
    for name, value in attributes_of(batch).items():
        object.__setattr__(changed, name, map_tensors(value, function, whole, seen))  # also of a frozen data class
    return changed


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return the batch on `device`; objects with a method `to` are asked to move themselves."""
    if all(t.device == device and not t.is_inference() for t in tensors_in(batch)):
        return batch
    return map_tensors(
        batch,
        lambda t: (ordinary(t) if t.is_inference() else t).to(device, non_blocking=True),
        lambda part: part.to(device) if callable(getattr(part, "to", None)) else None,
    )


def ordinary(t: Tensor) -> Tensor:
    """Return a copy that autograd can save, also of a tensor that was made under inference_mode."""
    with torch.inference_mode(False):
        return t.clone()
