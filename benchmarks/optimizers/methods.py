"""All optimizers of the benchmarks by name."""

from __future__ import annotations

from benchmarks.optimizers.first_order import FIRST_ORDER
from benchmarks.optimizers.peers import CHECK_ONLY, COST_ONLY, MATRIX, METHODS, VARIANTS, Method

__all__ = ["method_of"]


def method_of(name: str) -> Method:
    """Return a method, a variant, or what is measured for its cost only, by its name."""
    return {**MATRIX, **METHODS, **VARIANTS, **COST_ONLY, **FIRST_ORDER, **CHECK_ONLY}[name]
