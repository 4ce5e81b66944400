"""How far to go along a direction: searches on a function of one variable, phi(t), and its slope phi'(t).

A search knows nothing of parameters: it is given a `Line` and returns a `LineSearchResult`. Values that are not finite
count as too large, so that a search steps back from where a loss overflows; each search has a limit on evaluations and
says how it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from curvature.errors import InputError
from optimizers.newton.damping import require

__all__ = ["Armijo", "Grid", "Line", "LineSearch", "LineSearchResult", "StrongWolfe"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """phi(t) = f(x + t p), for a direction p."""

    value: Callable[[float], float]  # phi(t)
    start: float  # phi(0)
    slope: float  # phi'(0)
    value_and_slope: Callable[[float], tuple[float, float]] | None = None
    """(phi(t), phi'(t)), for searches that need slopes."""
    curvature: float = 0.0  # p'A p where it is negative: the model then falls faster than its slope says
    noise: float = 0.0  # by how much rounding may change phi: decreases below it cannot be told from increases


@dataclass(frozen=True)
class LineSearchResult:
    """Where a search ended."""

    step: float  # t; 0 where no step was found
    value: float  # phi(t)
    num_evaluations: int  # of phi
    success: bool  # whether t satisfies the conditions of the search
    message: str  # how it ended


LineSearch = Callable[[Line, float], LineSearchResult]
"""A search from (line, first t tried)."""


@dataclass(frozen=True, kw_only=True)
class Armijo:
    """Backtracking to phi(t) <= phi(0) + decrease (t phi'(0) + t^2 min(p'A p, 0) / 2) + noise.

    The next t is the minimiser of the parabola through phi(0), phi'(0) and phi(t), kept in [t / 10, shrink t].
    Along directions of negative curvature (`expand`) t is doubled as long as phi falls.

    Reference: Armijo (1966); Nocedal and Wright (2006), Numerical Optimization, section 3.5.

    Examples:
        >>> line = Line(value=lambda t: (t - 1.0) ** 2, start=1.0, slope=-2.0)
        >>> Armijo()(line, 4.0).step
        1.0
    """

    decrease: float = 1e-4  # share of the model's decrease that is asked for
    shrink: float = 0.5  # largest factor from one t to the next
    expand: float = 2.0  # factor by which t grows along negative curvature; 1 for none
    max_evaluations: int = 40  # most values of phi

    def __post_init__(self) -> None:
        ok = 0 < self.decrease < 1 and 0.1 <= self.shrink < 1 and self.expand >= 1 and self.max_evaluations >= 1
        require(ok, self, "decrease in (0, 1), shrink in [0.1, 1), expand >= 1 and max_evaluations >= 1")

    def __call__(self, line: Line, initial: float = 1.0) -> LineSearchResult:
        """Search from t = initial downward."""
        t, bend = initial, min(line.curvature, 0.0)
        if not (line.slope < 0 or (line.slope <= 0 and bend < 0)):
            return _none(line, 0, f"no direction of descent: the slope is {line.slope:.2g}")
        for count in range(1, self.max_evaluations + 1):
            value = line.value(t)
            if value <= line.start + self.decrease * (t * line.slope + t**2 * bend / 2) + line.noise:
                if bend < 0 and self.expand > 1:
                    return self._grown(line, t, value, count)
                return LineSearchResult(t, value, count, True, "sufficient decrease")
            t = _clipped(_parabola(line.start, line.slope, t, value), 0.1 * t, self.shrink * t)
        return _none(line, self.max_evaluations, f"no decrease down to a step of {t:.2g} of the direction")

    def _grown(self, line: Line, t: float, value: float, count: int) -> LineSearchResult:
        while count < self.max_evaluations:
            further = line.value(self.expand * t)
            count += 1
            if not further < value:
                break
            t, value = self.expand * t, further
        return LineSearchResult(t, value, count, True, "negative curvature followed as long as the loss fell")


@dataclass(frozen=True, kw_only=True)
class StrongWolfe:
    """Sufficient decrease and a slope that has flattened: |phi'(t)| <= flatness |phi'(0)|.

    Brackets a minimiser by growing t, then narrows the bracket by safeguarded cubic interpolation.

    Reference: Nocedal and Wright (2006), Numerical Optimization, algorithms 3.5 and 3.6.

    Examples:
        >>> line = Line(
        ...     value=lambda t: (t - 1.0) ** 2,
        ...     value_and_slope=lambda t: ((t - 1.0) ** 2, 2 * (t - 1.0)),
        ...     start=1.0,
        ...     slope=-2.0,
        ... )
        >>> StrongWolfe(flatness=0.1)(line, 0.1).success
        True
    """

    decrease: float = 1e-4  # share of the slope's decrease that is asked for
    flatness: float = 0.9  # how much of the slope may be left, in (decrease, 1)
    max_evaluations: int = 25  # most values of phi with slope

    def __post_init__(self) -> None:
        ok = 0 < self.decrease < self.flatness < 1 and self.max_evaluations >= 1
        require(ok, self, "0 < decrease < flatness < 1 and max_evaluations >= 1")

    def __call__(self, line: Line, initial: float = 1.0) -> LineSearchResult:
        """Search from t = initial upward, then within the bracket."""
        if line.value_and_slope is None:
            raise InputError("StrongWolfe needs slopes: give the line value_and_slope, or use Armijo.")
        if not line.slope < 0:
            return _none(line, 0, f"no direction of descent: the slope is {line.slope:.2g}")
        low, high = (0.0, line.start, line.slope), None
        t = initial
        for count in range(1, self.max_evaluations + 1):
            value, slope = line.value_and_slope(t)
            here = (t, value, slope)
            ceiling = line.start + self.decrease * t * line.slope + line.noise
            if not value <= ceiling or (low[0] > 0 and value >= low[1] + line.noise):
                high = here
            elif abs(slope) <= -self.flatness * line.slope:
                return LineSearchResult(t, value, count, True, "strong Wolfe conditions")
            elif high is None:
                low, high = (here, None) if slope < 0 else (here, low)
            else:
                low, high = here, (low if slope * (high[0] - t) >= 0 else high)
            if high is None:
                t *= 2.0
            elif abs(high[0] - low[0]) <= 1e-14 * max(high[0], low[0]):
                break
            else:
                t = _inside(low, high)
        if low[0] > 0 and low[1] < line.start:
            message = "sufficient decrease; the slope did not flatten within the evaluations allowed"
            return LineSearchResult(low[0], low[1], count, False, message)
        return _none(line, count, f"no decrease down to a step of {t:.2g} of the direction")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The best of t = initial shrink^k, k = 0, 1, ..., num_steps - 1: for losses that are cheap beside the direction.

    Reference: Mueller and Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural gradient descent.
    """

    shrink: float = 0.5  # factor from one t to the next
    num_steps: int = 31  # how many are tried

    def __post_init__(self) -> None:
        ok = 0 < self.shrink < 1 and self.num_steps >= 1
        require(ok, self, "shrink in (0, 1) and num_steps >= 1")

    def __call__(self, line: Line, initial: float = 1.0) -> LineSearchResult:
        """Evaluate phi on the whole grid."""
        steps = [initial * self.shrink**k for k in range(self.num_steps)]
        values = [(v if math.isfinite(v) else math.inf, t) for v, t in ((line.value(t), t) for t in steps)]
        value, t = min(values)
        if not value < line.start:
            return _none(line, len(steps), f"no decrease on a grid down to {steps[-1]:.2g} of the direction")
        return LineSearchResult(t, value, len(steps), True, "best of a grid")


def _none(line: Line, count: int, message: str) -> LineSearchResult:
    return LineSearchResult(0.0, line.start, count, False, message)


def _parabola(start: float, slope: float, t: float, value: float) -> float:
    """Return the minimiser of the parabola with phi(0), phi'(0) and phi(t); NaN where there is none."""
    bend = value - start - slope * t
    return -slope * t**2 / (2 * bend) if math.isfinite(bend) and bend > 0 else math.nan


def _clipped(t: float, least: float, most: float) -> float:
    return min(max(t, least), most) if math.isfinite(t) else most


def _inside(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Return the cubic's minimiser between two points, at least a tenth of their distance away from both."""
    (a, fa, da), (b, fb, db) = low, high
    t = math.nan
    if all(map(math.isfinite, (fb, db))):
        d1 = da + db - 3 * (fa - fb) / (a - b)
        inner = d1**2 - da * db
        if inner >= 0:
            d2 = math.copysign(math.sqrt(inner), b - a)
            denominator = db - da + 2 * d2
            t = b - (b - a) * (db + d2 - d1) / denominator if denominator != 0 else math.nan
    least, most = min(a, b), max(a, b)
    margin = 0.1 * (most - least)
    return _clipped(t, least + margin, most - margin) if math.isfinite(t) else (a + b) / 2
