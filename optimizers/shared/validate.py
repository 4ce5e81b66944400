"""Checks of an optimizer's settings. Each says what was wrong, what is allowed and what was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from curvature.errors import InputError

__all__ = ["check_at_least", "check_betas", "check_choice"]


def check_betas(betas: Any) -> None:
    """Refuse all but two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0.0 <= float(b) < 1.0 for b in betas):
        raise InputError(f"betas must be two numbers in [0, 1), got {betas!r}.")


def check_at_least(name: str, value: Any, least: float) -> None:
    """Refuse numbers below `least`, and NaN."""
    if not float(value) >= least:
        raise InputError(f"{name} must be a number >= {least:g}, got {value!r}.")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is not among the allowed names."""
    if value not in tuple(allowed):
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
