"""Plain values that JSON can hold, of what checkpoints and tasks say about themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["plain_values"]

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
