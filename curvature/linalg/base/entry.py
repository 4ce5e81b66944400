"""What every public function on a matrix does first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix

P = ParamSpec("P")
R = TypeVar("R")
_COMMON = {
    "A": "symmetric, (n, n): a tensor, an operator or an objective. Its symmetry is not checked.",
    "matrix": "which one of an objective; see `as_matrix`.",
    "generator": "source of all random numbers, on A's device, or a seed.",
    "checkpoint": "a folder for what has come out: after an interruption the same call with the same folder goes on "
    "from there, to the same numbers. It costs one product more a call, and memory on disk.",
    "callback": "called as the run goes on with the products so far and a word on progress.",
}
_ERRORS = "Besides, `InputError` is raised for arguments out of range, `NonFiniteError` if a product is not finite."


def numerics(function: Callable[P, R]) -> Callable[P, R]:
    """Check the kinds of arguments, compute without autocast, and confirm that all products were with one matrix.

    Ranks that hold parts of the matrix, or of its data, compare what they were given. What most functions take and
    raise is added to their docstrings here.
    """
    doc = inspect.cleandoc(function.__doc__ or "")
    names = [name for name in inspect.signature(function).parameters if name in _COMMON and f"\n    {name}:" not in doc]
    common = "".join(f"    {name}: {_COMMON[name]}\n" for name in names)
    function.__doc__ = f"{doc}\n\nCommon arguments:\n{common}\n{_ERRORS}" if names else doc
    return full_precision(one_matrix(checked(function, alike=True)))
