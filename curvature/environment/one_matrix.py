"""Runs of products that are meant to be products with one and the same matrix.

`@one_matrix` marks functions that apply a matrix many times and return one answer. What the matrix is made of tells the
run of its uses (`note_use`); before the answer is returned each of them confirms that it is still what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, Protocol, TypeVar

__all__ = ["Used", "in_run", "in_use", "note_use", "one_matrix"]

P = ParamSpec("P")
R = TypeVar("R")


class Used(Protocol):
    """Something that products are made of."""

    def confirm(self) -> None:
        """Raise an error unless it is what it was when it was used."""


_uses: ContextVar[dict[int, Used] | None] = ContextVar("uses", default=None)


def one_matrix(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function confirm, before it returns, that all its products were with one matrix."""

    @functools.wraps(function)
    def confirmed(*args: P.args, **kwargs: P.kwargs) -> R:
        if _uses.get() is not None:  # part of a longer run
            return function(*args, **kwargs)
        uses: dict[int, Used] = {}
        token = _uses.set(uses)
        try:
            result = function(*args, **kwargs)
        finally:
            _uses.reset(token)
        for used in uses.values():
            used.confirm()
        return result

    return confirmed


def note_use(used: Used) -> None:
    """Tell the present run, if there is one, what its products are made of."""
    uses = _uses.get()
    if uses is not None:
        uses[id(used)] = used


def in_run() -> bool:
    """Say whether products are part of a run."""
    return _uses.get() is not None


def in_use(used: Used) -> bool:
    """Say whether the present run has used it already."""
    uses = _uses.get()
    return uses is not None and id(used) in uses
