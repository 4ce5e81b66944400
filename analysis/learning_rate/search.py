"""Where to look next for the largest stable rate and the best one, on a logarithmic grid of rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.learning_rate.results import KEPT

__all__ = ["Ends", "Grid", "ends_of", "next_place"]

_SPAN = 2.0**24  # how far from the first guess rates are tried


@dataclass(frozen=True)
class Grid:
    """Rates first * ratio^k of whole k, and how far apart they are tried."""

    first: float
    ratio: float

    def lr(self, place: int) -> float:
        return self.first * self.ratio**place

    @property
    def octave(self) -> int:
        """Places that double the rate."""
        return max(1, round(math.log(2) / math.log(self.ratio)))

    @property
    def span(self) -> int:
        return math.ceil(math.log(_SPAN) / math.log(self.ratio))


@dataclass(frozen=True)
class Ends:
    """What losses at some places say."""

    best: int
    """Place of the lowest loss."""
    low: int
    """Largest place that is stable, with all between the best one and it."""
    high: int | None
    """Smallest unstable place above the best one."""
    monotone: bool
    """Whether all places above `high` are unstable."""


def ends_of(losses: Mapping[int, float], start: float) -> Ends | None:
    """Return the ends; None where no place has a loss below the start.

    Args:
        losses: place -> loss at the end of its branch.
        start: loss before the first step.
    """
    best = min(losses, key=lambda k: (losses[k], k))
    if not losses[best] < start:
        return None
    ceiling = start - KEPT * (start - losses[best])
    unstable = [k for k in losses if k > best and not losses[k] <= ceiling]
    high = min(unstable, default=None)
    low = max(k for k in losses if k >= best and (high is None or k < high))
    monotone = high is None or all(k in unstable for k in losses if k > high)
    return Ends(best, low, high, monotone)


def next_place(losses: Mapping[int, float], start: float, grid: Grid, *, depth: int) -> int | None:
    """Return the next place to try; None when all is known.

    First the largest stable place and the smallest unstable one are brought together: from the known ones upwards in
    steps that grow to factors of 4, then by bisection. Then the best place gets neighbours: half and double its rate,
    and `depth` halvings below.

    Args:
        losses: what is known, one place at least.
        start: loss before the first step.
        grid: of rates.
        depth: 0: the best rate is not asked for.
    """
    ends = ends_of(losses, start)
    jump = 2 * grid.octave
    if ends is None:
        place = min(losses) - jump
        return place if place >= -grid.span else None
    if ends.high is None and ends.low < grid.span:
        below = max((k for k in losses if k < ends.low), default=ends.low - jump)
        return ends.low + min(jump, 2 * (ends.low - below))
    if ends.high is not None and ends.high - ends.low > 1:
        return (ends.low + ends.high) // 2
    for i in range(1, depth + 1):
        place = ends.best - i * grid.octave
        if place not in losses and place >= -grid.span:
            return place
    above = ends.best + grid.octave
    inside = ends.high is None or above < ends.high
    return above if depth and inside and above not in losses and above <= grid.span else None
