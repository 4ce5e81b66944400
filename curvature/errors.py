"""Every error that a user of the toolkit can meet.

Each message says what was wrong, what is allowed, what was given and what to do next. All of them derive from
`CurvatureError`, so that a program (the command line, a training loop) can catch the lot; each also derives from the
built-in exception a reader would expect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = [
    "CheckFailedError",
    "CheckpointError",
    "CurvatureError",
    "DataError",
    "InputError",
    "NonFiniteError",
    "NotConvergedError",
    "ParameterSelectionError",
    "RankError",
    "TaskError",
    "WriteError",
]


class CurvatureError(Exception):
    """Base of every error raised on purpose by this toolkit."""


class InputError(CurvatureError, ValueError):
    """An argument has a wrong shape, dtype, device, range or kind."""


class DataError(CurvatureError, ValueError):
    """The data are empty, run dry, change between two passes, or cannot be cut as asked."""


class ParameterSelectionError(CurvatureError, ValueError):
    """A parameter pattern, module or predicate selects nothing, or something that is not there."""


class NonFiniteError(CurvatureError, ArithmeticError):
    """A loss, gradient or product is not finite; the message names the batch and the tensor."""


class CheckFailedError(CurvatureError, RuntimeError):
    """The self-check found that the objective is no well-defined twice differentiable function."""


class RankError(CurvatureError, RuntimeError):
    """Ranks of a process group hold different models, settings or vectors, or one of them failed."""


class TaskError(CurvatureError, ValueError):
    """A task name or reference leads to no task."""


class CheckpointError(CurvatureError, ValueError):
    """A checkpoint is missing, unreadable or does not fit the model."""


class WriteError(CurvatureError, OSError):
    """Results could not be written, or not all of them. `folder` is where they are instead; None if nowhere."""

    def __init__(self, message: str, folder: Path | None) -> None:
        super().__init__(message)
        self.folder = folder


class NotConvergedError(CurvatureError, RuntimeError):
    """An iteration stopped short of its accuracy. `result` holds what had been reached."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result
