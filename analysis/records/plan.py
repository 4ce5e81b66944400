"""Plans: the settings of a measurement, each with what it means and what it may be; options are made from the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["Plan", "choices", "from_plan", "setting"]

R = TypeVar("R")


def setting(
    default: Any = MISSING,
    text: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flag: str | None = None,
) -> Any:
    """Return the field of a plan: its default, what it means, its bounds, and the name of its option if another."""
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    about = {"text": text, "flag": flag, "bounds": {word: b for word, b in bounds.items() if b is not None}}
    return field(default=default, metadata=about)


class Plan:
    """Base of plans, which are frozen dataclasses of settings.

    Raises:
        InputError: for a value that is not finite, out of its bounds, or none of the words allowed.
    """

    def __post_init__(self) -> None:
        from curvature.errors import InputError  # not before: torch comes with it, and a list of commands needs none

        for f in fields(self):  # type: ignore[arg-type]  # every plan is a dataclass
            value, words = getattr(self, f.name), choices(self.__class__, f.name)
            if words and value not in words:
                raise InputError(f"{f.name} must be one of {', '.join(words)}, got {value!r}.")
            if isinstance(value, (int, float)) and not (math.isfinite(value) and _inside(f, value)):
                bounds = " and ".join(f"{word} {bound:g}" for word, bound in f.metadata.get("bounds", {}).items())
                raise InputError(f"{f.name} must be {bounds or 'finite'}, got {value}.")


def _inside(f: Field[Any], value: float) -> bool:
    inside = {"above": value.__gt__, "at least": value.__ge__, "below": value.__lt__, "at most": value.__le__}
    return all(inside[word](bound) is True for word, bound in f.metadata.get("bounds", {}).items())


def choices(plan: type, name: str) -> tuple[str, ...]:
    """Return the words that a field may be; empty where it is no word."""
    hint = get_type_hints(plan)[name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def from_plan(plan: type, **usual: Any) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let a measurement `f(objective, plan, ...)` be called with a plan or its fields, and a generator or its seed.

    Args:
        plan: its class.
        **usual: settings that a call with keywords has by default where the plan has others.

    Raises:
        InputError: at the call, for both at once or settings out of range.
    """
    names = [f.name for f in fields(plan)]

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def call(objective: Any, given: Any = None, /, **others: Any) -> R:
            from curvature.errors import InputError
            from curvature.generators import as_generator

            given = others.pop("plan", given)
            settings = {name: others.pop(name) for name in names if name in others}
            if given is not None and settings:
                raise InputError(f"give a plan or single settings, not both; {', '.join(settings)} came beside one.")
            if "generator" in others and hasattr(objective, "device"):
                others["generator"] = as_generator(others["generator"], objective.device)
            return function(objective, plan(**(usual | settings)) if given is None else given, **others)

        return call

    return wrap
