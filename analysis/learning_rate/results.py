"""Learning rates as short trainings show them: the largest stable one, the best one, and what a warm-up does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from curvature.results.record import Result

__all__ = ["Branch", "Estimate", "LearningRateRange", "ThresholdPoint", "WarmUp"]

KEPT = 0.1
"""Share of the best branch's fall of the loss that a stable branch has kept at its end."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Branch(Result):
    """One training from the common start."""

    seed: int
    """Which of the seeds: of the order of batches, dropout and, with `fresh`, the parameters."""
    lr: float
    """Learning rate, after the warm-up."""
    steps: int
    """Steps it was given."""
    warmup: int = 0
    """Steps in which the rate rose linearly to `lr`; 0: none."""
    start: float
    """Loss on all data before the first step."""
    loss: float
    """Mean training loss of its last quarter; infinite if a loss was not finite or far above the start."""
    taken: int
    """Steps until it ended."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """A guess at the largest stable rate that needs no training, for comparison."""

    name: str
    """How it was made."""
    lr: float
    """What it says."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ThresholdPoint(Result):
    """The rates at which a step would no longer be stable, amid a training."""

    step: int
    """Steps that were taken before."""
    critical: float
    """Rate at which this very step leaves the loss where it was; NaN where it was not bracketed."""
    edge: float
    """Stability limit of the optimizer over the largest eigenvalue of P^-1 H; NaN where P is not known."""


@dataclass(frozen=True, kw_only=True, repr=False)
class WarmUp(Result):
    """The largest stable rate with a linear warm-up, from branches of the first seed."""

    steps: int
    """Length of the warm-up: where the threshold has come to most of its rise, or a tenth of the steps."""
    rise: float
    """The threshold after that over the threshold at the start; NaN where it was not measured."""
    lower: float
    """Largest rate that was stable with it."""
    upper: float
    """Smallest rate that was not; infinite if none was found."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LearningRateRange(Result):
    """The largest stable and the best learning rate of a training, as intervals over seeds.

    A branch is unstable where a loss is not finite or above 1e6 times the start (or 1, if larger), or where the mean
    training loss of its last quarter lies above L0 - 0.1 (L0 - L*): L0 the loss at the start, L* the lowest such mean
    of all branches of the same seed and length. The largest stable rate of a seed lies between the best rate and the
    smallest unstable rate above it.
    """

    _figure = "plot_learning_rates"

    lower: float
    """The largest stable rate is between this, NaN if no rate lowered the loss, ..."""
    upper: float
    """... and this, infinite if no rate was unstable. Where seeds differ it is what was seen of them, widened on both
    sides by the resolution: about half of all further seeds lie outside of what three have shown."""
    seed_lower: tuple[float, ...]
    """Largest stable rate of each seed that was tried."""
    seed_upper: tuple[float, ...]
    """Smallest unstable rate of each."""
    best: tuple[float, ...]
    """Rate with the lowest loss at the end, for each seed."""
    best_lower: float
    """The best rates, and the next ones tried below ..."""
    best_upper: float
    """... and above: the loss is lowest between the two."""
    steps: int
    """Length of the training that this is about."""
    num_steps: int
    """Steps of all branches."""
    branches: tuple[Branch, ...]
    """All of them, in the order they were taken."""
    estimates: tuple[Estimate, ...]
    """What estimates without training say; on the tasks of `benchmarks/tracking` none was a sufficient answer."""
    threshold: tuple[ThresholdPoint, ...]
    """Along a training at the best rate, first seed."""
    warmup: WarmUp | None
    """What a warm-up does to the largest stable rate; None where it was not asked for."""
    optimizer: str
    """Its class."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def headroom(self) -> float:
        """The largest stable rate over the best one, geometric means over seeds."""
        if not (self.best and math.isfinite(self.upper) and self.lower > 0):
            return math.nan
        ends = zip(self.seed_lower, self.seed_upper, self.best, strict=True)
        return math.exp(sum(math.log(low * high) / 2 - math.log(best) for low, high, best in ends) / len(self.best))

    def summary(self) -> dict[str, Any]:
        """Return the main numbers."""
        names = ("lower", "upper", "best_lower", "best_upper", "headroom", "num_steps")
        return {name: getattr(self, name) for name in names}
