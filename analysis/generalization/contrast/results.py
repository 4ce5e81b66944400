"""Trainings side by side, and their differences within repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.records.measured import Bounded, Measured
from analysis.show.drawing import Array
from curvature.results.record import Result

__all__ = ["ContrastRow", "Contrasts"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ContrastRow(Result):
    """One trained network, measured."""

    condition: str
    """What was different about its training."""
    repeat: int
    """Repeats of one number share examples, seeds and label noise over all conditions."""
    fit_steps: float
    """Steps after which all training labels were first fitted; NaN if they never were."""
    steps: int
    """Steps after which it was measured."""
    reached: bool
    """Whether its training loss had come down to the target there (true where there is none)."""
    train_loss: float
    """On the training data as they were given, in eval mode, of the loss without a regulariser's part."""
    train_error: float
    test_loss: float
    test_error: float
    """On clean test data, their pixels treated like those of training."""
    norm: float
    """Euclidean norm of the parameters ..."""
    distance: float
    """... and of their way from the start."""
    sharpness: float
    """Largest eigenvalue of the Hessian of the training loss."""
    trace: float
    """Of its Gauss-Newton matrix."""
    effective_dimension: float
    """Of the loss summed over examples, beside the regulariser."""
    noise_scale: float
    """tr S / |G|^2 of single examples' gradients, in examples; negative or infinite where |G|^2 is within its error."""
    noise_trace: float
    """tr S, their covariance's trace."""
    history: tuple[tuple[int, float], ...]
    """Training error along the steps."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrasts(Result):
    """Conditions side by side; the first one is what the others are held against."""

    _figure = "plot_contrast_ratios"

    title: str
    """"labels" or "regularization"."""
    conditions: tuple[str, ...]
    """The first is the baseline."""
    rows: tuple[ContrastRow, ...]
    """By condition, then repeat."""
    num_samples: int
    num_test: int
    num_params: int
    num_classes: int
    label_noise: float
    target: float
    """Training loss at which networks were measured; 0 where they were measured after all steps."""
    regulariser: float
    """alpha of the effective dimension."""
    loss: str
    steps: int
    """Steps at most."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    def of(self, name: str) -> Array:
        """Return a field as (conditions, repeats)."""
        by = {(row.condition, row.repeat): float(getattr(row, name)) for row in self.rows}
        repeats = sorted({row.repeat for row in self.rows})
        return np.array([[by[condition, r] for r in repeats] for condition in self.conditions])

    def mean(self, name: str, condition: str) -> Measured:
        """Return the mean over repeats with its standard error."""
        own = self.of(name)[self.conditions.index(condition)]
        return Measured(
            value=float(own.mean()), stderr=float(own.std(ddof=1)) / math.sqrt(len(own)), dof=len(own) - 1.0
        )

    def reached(self, condition: str) -> bool:
        """Return whether all repeats came to the target; true where there is none."""
        return all(row.reached for row in self.rows if row.condition == condition)

    def ratio(self, name: str, condition: str, confidence: float = 0.95) -> Bounded:
        """Return a positive field over that of the baseline: the geometric mean within repeats, and its interval.

        NaN where a value is not positive, or where networks to be measured at one training loss did not come there.
        """
        found = self.of(name)
        if not (self.reached(condition) and self.reached(self.conditions[0])):
            return Bounded.between(math.nan, math.nan)
        own, base = found[self.conditions.index(condition)], found[0]
        if not (np.isfinite(own).all() and np.isfinite(base).all() and (own > 0).all() and (base > 0).all()):
            return Bounded.between(math.nan, math.nan)
        logs = np.log(own / base)
        half = float(stats.t.ppf(0.5 + confidence / 2, len(logs) - 1)) * logs.std(ddof=1) / math.sqrt(len(logs))
        middle = float(logs.mean())
        return Bounded.between(math.exp(middle - half), math.exp(middle + half), math.exp(middle))

    def difference(self, name: str, condition: str) -> Measured:
        """Return a field less that of the baseline, the mean within repeats and its standard error."""
        found = self.of(name)
        off = found[self.conditions.index(condition)] - found[0]
        return Measured(
            value=float(off.mean()), stderr=float(off.std(ddof=1)) / math.sqrt(len(off)), dof=len(off) - 1.0
        )

    def summary(self) -> dict[str, Any]:
        """Return the mean sharpness and test error of each condition."""
        return {c: {n: self.mean(n, c).value for n in ("sharpness", "test_error")} for c in self.conditions}
