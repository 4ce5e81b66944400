"""What every public function on a matrix does first."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix

P = ParamSpec("P")
R = TypeVar("R")


def numerics(function: Callable[P, R]) -> Callable[P, R]:
    """Check the kinds of arguments, compute without autocast, and confirm that all products were with one matrix."""
    return full_precision(one_matrix(checked(function)))
