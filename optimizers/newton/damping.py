"""How damping, trust-region radius and cubic weight follow the ratio of what a step gained to what its model promised.

Each rule is a pure function of the last value and the ratio. A ratio of 1 is a perfect model; NaN or minus infinity,
from a loss that is not finite at the trial point, counts as the worst there is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from curvature.errors import InputError

__all__ = ["ACCEPTED", "CubicRule", "DampingRule", "RadiusRule", "reduction_ratio", "require"]

ACCEPTED = 1e-4
"""Ratio from which a damped step is taken."""


def require(condition: bool, rule: Any, needs: str) -> None:
    """Refuse settings of a rule, a dataclass, that do not keep a condition."""
    if not condition:
        raise InputError(f"{type(rule).__name__} needs {needs}, got {asdict(rule)}.")


def reduction_ratio(before: float, after: float, model_decrease: float, eps: float) -> float:
    """Return (before - after) / model_decrease, with both moved up by what rounding, `eps`, can do to `before`.

    Near a minimum both are rounding, and the ratio comes out as 1 instead of noise. -inf where `after` is not finite.

    Reference: Conn, Gould and Toint (2000), Trust-Region Methods, section 17.4.2.
    """
    if not math.isfinite(after):
        return -math.inf
    slack = 10 * eps * abs(before)
    promised = model_decrease + slack
    return (before - after + slack) / promised if promised > 0 else -math.inf


@dataclass(frozen=True, kw_only=True)
class DampingRule:
    """Levenberg and Marquardt's damping: down after a good ratio, up after a bad one.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, section 4.1, for the default factors.

    Examples:
        >>> rule = DampingRule()
        >>> rule(3.0, 0.9), rule(3.0, 0.5), rule(2.0, 0.1)
        (2.0, 3.0, 3.0)
    """

    low: float = 0.25  # ratio below which damping rises
    high: float = 0.75  # ratio above which damping falls
    highest: float = math.inf
    """Ratio above which it stays: the loss fell far more than predicted, so the model cannot be trusted."""
    increase: float = 3 / 2  # factor upward
    decrease: float = 2 / 3  # factor downward
    minimum: float = 0.0  # least damping
    maximum: float = 1e16  # largest damping

    def __post_init__(self) -> None:
        ok = 0 <= self.low < self.high < self.highest and self.increase > 1 and 0 < self.decrease <= 1
        require(ok, self, "0 <= low < high < highest, increase > 1 and 0 < decrease <= 1")

    def __call__(self, damping: float, ratio: float) -> float:
        """Return the damping of the next step."""
        if self.high < ratio <= self.highest:
            return max(damping * self.decrease, self.minimum)
        return damping if ratio >= self.low else min(damping * self.increase, self.maximum)


@dataclass(frozen=True, kw_only=True)
class RadiusRule:
    """The radius of a trust region: wider after a good step to its boundary, narrower after a bad one.

    Reference: Nocedal and Wright (2006), Numerical Optimization, algorithm 4.1.

    Examples:
        >>> rule = RadiusRule()
        >>> rule(1.0, 0.9, 1.0), rule(1.0, 0.9, 0.5), rule(1.0, 0.1, 0.8)
        (2.0, 1.0, 0.2)
    """

    accept: float = 1e-4  # ratio from which a step is taken
    low: float = 0.25  # ratio below which the radius shrinks
    high: float = 0.75  # ratio above which the radius grows if the step reached the boundary
    shrink: float = 0.25  # factor on the step's length
    grow: float = 2.0  # factor on the radius
    maximum: float = 1e8  # largest radius

    def __post_init__(self) -> None:
        ok = 0 <= self.accept <= self.low < self.high and 0 < self.shrink < 1 < self.grow
        require(ok, self, "0 <= accept <= low < high and 0 < shrink < 1 < grow")

    def __call__(self, radius: float, ratio: float, length: float) -> float:
        """Return the next radius after a step of that length."""
        if not ratio >= self.low:
            return self.shrink * min(length, radius) if length > 0 else self.shrink * radius
        at_boundary = length >= 0.999 * radius
        return min(self.grow * radius, self.maximum) if ratio > self.high and at_boundary else radius


@dataclass(frozen=True, kw_only=True)
class CubicRule(DampingRule):
    """The weight sigma of the cubic term, by the rule of damping: steps are taken from the ratio `low` on.

    Reference: Cartis, Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained optimization,
    part I, section 7.
    """

    low: float = 0.1
    high: float = 0.9
    increase: float = 2.0
    decrease: float = 0.5
    minimum: float = 1e-16
    maximum: float = 1e32
