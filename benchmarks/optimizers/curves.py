"""What a training run of the optimizers' benchmark reached: after as many steps, and after the time of as many."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["at_equal_steps", "at_equal_time"]

Row = dict[str, Any]


def at_equal_steps(one: Row) -> tuple[float, float]:
    """Return (loss, score) of a run's end; infinite and NaN if it diverged or did not get there."""
    last = one["curve"][-1]
    if one["diverged"] or last[0] < one["steps"]:
        return math.inf, math.nan
    return last[2], last[3]


def at_equal_time(one: Row) -> tuple[float, float]:
    """Return (loss, score) of the last evaluation within the time of as many steps of SGD."""
    if one["diverged"]:
        return math.inf, math.nan
    point = [p for p in one["curve"] if p[1] <= 1.05 * one["steps"]][-1]  # clocks differ by a few per cent
    return point[2], point[3]
