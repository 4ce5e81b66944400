"""Plain values that JSON can hold: of records, and of what checkpoints and tasks say about themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from curvature.results.estimates import SpectralDensity

__all__ = ["Plain", "plain_values", "to_plain"]

_MOST, _DEEPEST, _LEFT_OUT = 10_000, 20, "[...]"


def plain_values(value: Any) -> Any:
    """Return nested dicts, lists, strings, numbers, bools and None in place of whatever a mapping or list holds.

    Other objects become their text, tensors of more than 16 entries their shape; "[...]" stands for what is nested too
    deeply, refers to itself, or comes after the first 10 000 values.
    """
    return _plain(value, 0, iter(range(_MOST)))


def _plain(value: Any, depth: int, count: Iterator[int]) -> Any:
    if depth > _DEEPEST or next(count, None) is None:
        return _LEFT_OUT
    if value is None or isinstance(value, (bool, float)):
        return value if value is None or isinstance(value, bool) else float(value)
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else f"about {'-' if value < 0 else ''}2^{value.bit_length()}"
    if isinstance(value, (np.ndarray, np.generic)) and value.size <= 16:
        return _plain(value.tolist(), depth + 1, count)
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_meta or value.numel() > 16:
            return "nested tensor" if value.is_nested else f"tensor of shape {tuple(value.shape)}"
        return _plain(value.tolist(), depth + 1, count)
    if isinstance(value, Mapping):
        return {_text(key): _plain(item, depth + 1, count) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1, count) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    try:
        text = str(value)
    except Exception:  # of a user's own __str__, or of an integer too long to print
        text = f"<{type(value).__name__}>"
    return text.encode("utf-8", "replace").decode("utf-8")


class Plain:
    """Adds `to_dict` to a record."""

    _also: ClassVar[tuple[str, ...]] = ()
    """Properties that `to_dict` has, too."""

    def to_dict(self) -> dict[str, Any]:
        """Return all but large arrays as plain Python values; numbers that are not finite as None."""
        return {**to_plain(self), **{name: to_plain(getattr(self, name)) for name in self._also}}


def to_plain(value: Any, *, number: Callable[[float], Any] = lambda x: x if math.isfinite(x) else None) -> Any:
    """Return a record as nested dicts and lists: enums by name, no large arrays, and what JSON knows not as text.

    Left out are the fields that a record declares large and the curve of a `SpectralDensity`; a run folder has them.

    Args:
        value: a record, or what stands in one.
        number: what stands for a number; by default None for one that is not finite.
    """
    if isinstance(value, Tensor):
        return to_plain(value.detach().cpu().tolist(), number=number)
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist(), number=number)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(item, number=number) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, number=number) for key, item in value.items()}
    if is_dataclass(value):
        small = [f.name for f in fields(value) if f.name not in getattr(value, "_large", ())]
        if isinstance(value, SpectralDensity):
            small = [name for name in small if not isinstance(getattr(value, name), Tensor)]
        return {name: to_plain(getattr(value, name), number=number) for name in small}
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
