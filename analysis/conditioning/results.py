"""What measuring the conditioning of a loss returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from analysis.records.measured import Bounded, Measured
from curvature.results.record import Result

__all__ = ["Condition", "Conditioning", "ConditioningComparison"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Condition(Result):
    """How unequal the curvatures of one matrix are."""

    name: str
    """Of the layer, or of the preconditioner P in P^-1/2 A P^-1/2."""
    num_params: int
    """Size of the matrix."""
    largest: Measured
    """Largest |eigenvalue|; loss / parameter^2, of preconditioned matrices in the units P leaves."""
    smallest: Bounded
    """Smallest |eigenvalue| in the numerical range; the same units."""
    condition: Bounded
    """Largest over smallest |eigenvalue| in the numerical range: at least 1, and at most 1 over its floor. Where that
    is its upper bound, it is known from below only. The value is the geometric mean of the bounds."""
    rank: Bounded
    """Number of eigenvalues in the numerical range."""
    effective_rank: Measured
    """exp of the entropy of |lambda_i| / sum |lambda| (Roy and Vetterli 2007): n if all are equal, 1 for rank one."""
    stable_rank: Measured
    """sum lambda^2 / max lambda^2, |A|_F^2 / |A|_2^2: between 1 and the rank."""
    exact: bool
    """Whether the matrix was built entry by entry, which leaves rounding as the only error."""
    num_matvecs: int
    """Products with it."""
    estimated: bool = False
    """Whether the preconditioner is an estimate itself: errors are those of this one, other seeds give another."""

    def steps(self, accuracy: float) -> float:
        """Return kappa log(1 / accuracy): steps of gradient descent with rate 1 / lambda_max that certainly suffice.

        For a quadratic with these curvatures, all positive, the distance from the minimum falls by 1 - 1 / kappa a
        step, or faster; of directions outside of the range nothing is said.
        """
        return self.condition.value * math.log(1 / accuracy)

    def steps_with_momentum(self, accuracy: float) -> float:
        """Return kappa^(1/2) log(1 / accuracy) / 2, the steps of Polyak's method with its best constants.

        Its rate is (kappa^(1/2) - 1) / (kappa^(1/2) + 1), which is exp(-2 kappa^(-1/2)) for large kappa.
        """
        return self.condition.value**0.5 * math.log(1 / accuracy) / 2


@dataclass(frozen=True, kw_only=True, repr=False)
class Conditioning(Result):
    """The conditioning of a loss, of its layers, and with preconditioners."""

    _figure = "plot_conditioning"
    _also = ("gains", "layer_spread")

    matrix: str
    """"hessian" or "ggn"."""
    floor: float
    """|eigenvalues| of at most this share of the largest lie outside the numerical range."""
    whole: Condition
    """The whole matrix."""
    preconditioned: tuple[Condition, ...]
    """The same under each preconditioner."""
    layers: tuple[Condition, ...]
    """Diagonal blocks of the modules that own parameters; empty if not asked for."""
    max_stable_lr: float
    """2 / lambda_max: gradient descent with a larger rate diverges along the sharpest direction; inf without one."""
    damping: Tensor
    """(m,), z, ascending; loss / parameter^2."""
    effective_dimension: Tensor
    """(m,), sum over positive lambda of lambda / (lambda + z): directions that the data determine beyond a prior of
    precision z (MacKay 1992)."""
    effective_dimension_stderr: Tensor
    """(m,), one standard error: probes and quadrature, root of squares."""
    notes: tuple[str, ...]
    """What a reader should know."""
    layers_under: dict[str, tuple[Condition, ...]] = field(default_factory=dict)
    """By preconditioner, the layers' blocks under it; empty if not asked for."""

    @property
    def gains(self) -> dict[str, Bounded]:
        """By preconditioner, the condition number without it over that with it: where all of it is above 1 it helps."""
        return {c.name: self.whole.condition.over(c.condition) for c in self.preconditioned}

    @property
    def layer_spread(self) -> float:
        """Largest over smallest top |eigenvalue| of the layers: how far apart their best learning rates are."""
        tops = [c.largest.value for c in self.layers]
        return max(tops) / min(tops) if tops and min(tops) > 0 else (math.inf if any(tops) else math.nan)


@dataclass(frozen=True, kw_only=True, repr=False)
class ConditioningComparison(Result):
    """Two models side by side, e.g. with and without normalisation layers."""

    _also = ("ratios",)

    first: Conditioning
    second: Conditioning

    @property
    def ratios(self) -> dict[str, Bounded]:
        """Second over first: condition number, largest eigenvalue, effective and stable rank, spread over layers."""
        names = ("condition", "largest", "effective_rank", "stable_rank")
        pairs = {name: (getattr(self.second.whole, name), getattr(self.first.whole, name)) for name in names}
        found = {name: _bounded(a).over(_bounded(b)) for name, (a, b) in pairs.items()}
        spread = self.second.layer_spread / self.first.layer_spread if self.first.layer_spread else math.nan
        return {**found, "layer_spread": Bounded.between(spread, spread)}


def _bounded(measured: Measured) -> Bounded:
    """Return a number between the ends of its 95 % interval."""
    return measured if isinstance(measured, Bounded) else Bounded.between(*measured.interval(), measured.value)
