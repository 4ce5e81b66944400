"""Who is told how a measurement gets on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

__all__ = ["Listener", "Progress", "stages"]

Progress = Callable[[str, int, int], None]
"""Told the stage, how many units of work are done, and how many there are; lines below the stage are shown live."""


def stages(progress: Progress | None, total: int) -> Callable[[str], None]:
    """Return what is told each stage as it begins, and tells how many of all are done."""
    done = count()

    def tell(stage: str) -> None:
        if progress is not None:
            progress(stage, next(done), total)

    return tell


class Listener:
    """Told how a measurement gets on; this one keeps it to itself."""

    when_loaded: Callable[[Any, Any], object] | None = None
    """Called with task and objective before anything is measured: the time to reserve a folder by the task's name."""

    def loaded(self, what: str, size: str) -> None:
        """The task is there and its parameters are selected."""

    def doing(self, what: str) -> AbstractContextManager[object]:
        """Something of a few seconds begins; it is over when the context ends."""
        del what
        return nullcontext()

    def priced(self, estimate: str, total: int, unit: str) -> None:
        """It is known what the measurement will cost, in a sentence, and of how many units it consists."""

    def advanced(self, stage: str, done: int, planned: int) -> None:
        """A unit of work is done."""
