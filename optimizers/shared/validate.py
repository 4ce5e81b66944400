"""Checks of an optimizer's settings. Each says what was wrong, what is allowed and what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from curvature.errors import InputError

__all__ = ["check_at_least", "check_betas", "check_choice", "check_group", "check_positive"]


def check_group(group: dict[str, Any]) -> None:
    """Refuse parameters, rates and seeds that no optimizer takes."""
    for p in group["params"]:
        if p.is_complex() or not p.is_floating_point():
            raise InputError(
                f"parameters must be real floating point, got {p.dtype}; view a complex one by torch.view_as_real."
            )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InputError(f"a tensor lr must have one entry, got shape {tuple(lr.shape)}.")
    if not _number("lr", lr) >= 0:
        raise InputError(f"lr must be >= 0, got {lr}.")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
        raise InputError(f"seed must be an integer, got {group['seed']!r}.")


def check_betas(betas: Any) -> None:
    """Refuse all but two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= _number("betas", b) < 1 for b in betas):
        raise InputError(f"betas must be two numbers in [0, 1), got {betas!r}.")


def check_at_least(name: str, value: Any, least: float) -> None:
    """Refuse numbers below `least`, and NaN."""
    if not _number(name, value) >= least:
        raise InputError(f"{name} must be a number >= {least:g}, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse numbers that are not positive and finite."""
    if not 0 < _number(name, value) < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value}.")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is not among the allowed names."""
    if value not in tuple(allowed):
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be one number, got {value!r}.") from None
