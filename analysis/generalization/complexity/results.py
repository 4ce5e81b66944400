"""Effective model complexity, and in which regime a training lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.generalization.descent.results import DescentRow
from analysis.show.drawing import Array
from curvature.results.record import Result

__all__ = ["EffectiveModelComplexity"]


@dataclass(frozen=True, kw_only=True, repr=False)
class EffectiveModelComplexity(Result):
    """The largest number of examples that a training procedure fits to a mean training error of at most epsilon."""

    _figure = "plot_model_complexity"

    epsilon: float
    """Training error that counts as fitted."""
    rows: tuple[DescentRow, ...]
    """All trainings, by number of examples, then repeat."""
    samples: int
    """Examples of the training whose regime is asked for."""
    available: int
    """Training examples there are: beyond them nothing is known."""
    confidence: float
    """Of the interval."""
    num_params: int
    label_noise: float
    """Probability that a label is another class: wrong labels have to be fitted, too."""
    loss: str
    steps: int
    """Of the optimizer, part of the procedure."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def counts(self) -> Array:
        """Numbers of examples that were tried, ascending."""
        return np.array(sorted({row.num_samples for row in self.rows}))

    def errors(self) -> Array:
        """Return the training errors, (counts, repeats)."""
        by: dict[int, list[float]] = {}
        for row in self.rows:
            by.setdefault(row.num_samples, []).append(row.train_error)
        return np.array([by[int(n)] for n in self.counts])

    @property
    def diverged(self) -> int:
        """Trainings whose outputs are not finite; they fitted nothing."""
        return int((~np.isfinite(self.errors())).sum())

    def reach(self) -> tuple[Array, Array, Array]:
        """Return mean training error and the ends of Student's interval, one end at a time: (1 + confidence) / 2.

        NaN where a training diverged: no number of examples with such a one counts as fitted.
        """
        found = self.errors()
        mean, k = found.mean(axis=1), found.shape[1]
        half = float(stats.t.ppf(0.5 + self.confidence / 2, k - 1)) * found.std(axis=1, ddof=1) / math.sqrt(k)
        return mean, mean - half, mean + half

    @property
    def value(self) -> float:
        """Largest number tried whose mean training error is at most epsilon; 0 if none is."""
        fitted = self.counts[self.reach()[0] <= self.epsilon]
        return float(fitted[-1]) if len(fitted) else 0.0

    @property
    def lower(self) -> float:
        """Up to here the mean training error over further seeds is at most epsilon, with the confidence; 0: nowhere."""
        return self._ends()[0]

    @property
    def upper(self) -> float:
        """From here on it is larger, with the confidence; infinite where that is so for no number that was tried."""
        return self._ends()[1]

    def _ends(self) -> tuple[float, float]:
        _, low, high = self.reach()
        beyond, within = ~(high <= self.epsilon), ~(low <= self.epsilon)  # NaN is never fitted
        first = int(np.argmax(beyond)) if beyond.any() else len(beyond)
        lower = float(self.counts[first - 1]) if first > 0 else 0.0
        after = len(within) - int(np.argmin(within[::-1])) if not within.all() else 0
        upper = float(self.counts[after]) if after < len(within) else math.inf
        return lower, upper

    @property
    def regime(self) -> str:
        """Return "under-parametrised", "critical" or "over-parametrised", of a training on `samples` examples.

        "unknown" where trainings diverged: it is not their size that kept them from fitting.

        Nakkiran et al. (2019) leave open how close to the complexity is critical; here it is what the interval leaves
        undecided.
        """
        lower, upper = self._ends()
        if self.samples <= lower:
            return "over-parametrised"
        if self.diverged:
            return "unknown"
        return "under-parametrised" if self.samples >= upper else "critical"

    def summary(self) -> dict[str, Any]:
        """Return the main numbers."""
        return {"value": self.value, "lower": self.lower, "upper": self.upper, "regime": self.regime} | (
            {"diverged": self.diverged} if self.diverged else {}
        )
