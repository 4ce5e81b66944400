"""Curves of trainings along width, epochs or examples, and what is read off them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.show.drawing import Array
from curvature.results.record import Result

__all__ = ["DescentCurve", "DescentRow", "Peak", "Threshold"]

EXACT = 1e-10
"""Training loss below which least squares has interpolated its labels: it fits their classes long before."""

_SHARES = ("train_error", "test_error")
UNSETTLED = 0.03
"""Above this share of the gradient at the start, a network that does not fit its labels is told as not converged."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DescentRow(Result):
    """One trained network, or one least-squares solution."""

    value: float
    """Width, epochs or number of training examples."""
    repeat: int
    """Which repeat; those of one number share labels, their noise, and the seed of the parameters."""
    num_params: int
    num_samples: int
    """Training examples."""
    train_loss: float
    """Mean over the training examples, by the labels it was trained on."""
    train_error: float
    """Share of these labels that it does not reproduce."""
    test_loss: float
    """Mean over test examples, whose labels are clean."""
    test_error: float
    """Share of them that are classified wrongly."""
    gradient: float
    """Norm of the training gradient at the end over that at the start; 0 for least squares."""
    norm: float
    """Euclidean norm of the parameters."""
    sharpness: float = math.nan
    """Largest eigenvalue of the Hessian of the training loss."""
    trace: float = math.nan
    """Of its Gauss-Newton matrix."""
    effective_dimension: float = math.nan
    """sum lambda / (lambda + alpha), lambda of the Gauss-Newton matrix of the loss summed over examples."""
    effective_dimension_stderr: float = math.nan
    """Over probes; 0 where all eigenvalues are known."""
    condition: float = math.nan
    """Of J J', J the Jacobian of the outputs: largest over smallest eigenvalue other than zero."""
    rank: int = -1
    """Number of its eigenvalues above the cutoff; -1 where they are not known."""
    expected: float = math.nan
    """Test loss averaged over label noise in closed form, features given; least squares only."""
    simulated: float = math.nan
    """The same as the mean over 32 further draws of the labels."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Threshold(Result):
    """Where training labels, wrong ones included, begin to be fitted without error (along examples: cease to be)."""

    lower: float
    """The smallest of the last values on the near side, over repeats; 0 where the first value is beyond already ..."""
    upper: float
    """... and the largest of the first values on the far side; infinite where some repeat did not get there."""
    repeats: tuple[tuple[float, float], ...]
    """Each repeat's own interval."""

    @property
    def found(self) -> bool:
        """Whether all repeats have crossed it within the values tried."""
        return self.lower > 0 and math.isfinite(self.upper)

    @property
    def middle(self) -> float:
        """Geometric mean over repeats of the middles of their intervals; NaN unless all have crossed it."""
        if not self.found:
            return math.nan
        return math.exp(sum(math.log(a * b) / 2 for a, b in self.repeats) / len(self.repeats))


@dataclass(frozen=True, kw_only=True, repr=False)
class Peak(Result):
    """The highest rise and fall of a curve, in differences within repeats; of losses, between their logarithms."""

    value: float
    """Where."""
    height: float
    """Mean over repeats there; of losses the geometric one, whose mean has no variance at a pole."""
    before: float
    """Value of the lowest point before ..."""
    rise: float
    """... and how far the peak is above it (of losses, by the logarithm of their ratio), ..."""
    rise_stderr: float
    """... with a standard error over repeats; the peak's place was chosen from the same numbers."""
    after: float
    """Value of the lowest point after ..."""
    fall: float
    """... and how far the peak is above that."""
    fall_stderr: float
    dof: float
    """Repeats less one."""

    @property
    def standing(self) -> float:
        """The smaller of rise and fall, in standard errors."""
        pairs = ((self.rise, self.rise_stderr), (self.fall, self.fall_stderr))
        return min(d / e if e > 0 else math.copysign(math.inf, d) for d, e in pairs)

    @property
    def p_value(self) -> float:
        """One-sided, Student's t of the smaller of the two."""
        return float(stats.t.sf(self.standing, self.dof))


@dataclass(frozen=True, kw_only=True, repr=False)
class DescentCurve(Result):
    """Test error, loss and curvature along width, epochs or number of examples."""

    _figure = "plot_descent"

    vary: str
    """"width", "epochs" or "samples"."""
    model: str
    """"task" or "random-features"."""
    rows: tuple[DescentRow, ...]
    """By value, then repeat."""
    num_samples: int
    """Training examples; of the largest training along "samples"."""
    num_test: int
    """Test examples."""
    num_classes: int
    label_noise: float
    """Probability that a training label is one of the other classes; test labels are clean."""
    loss: str
    """What was trained."""
    regulariser: float
    """alpha of the effective dimension."""
    steps: int
    """Of the optimizer; 0 for least squares."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def values(self) -> Array:
        """What was tried, ascending."""
        return np.array(sorted({row.value for row in self.rows}))

    def of(self, name: str) -> Array:
        """Return a field of the rows as (values, repeats)."""
        by = {(row.value, row.repeat): float(getattr(row, name)) for row in self.rows}
        repeats = sorted({row.repeat for row in self.rows})
        return np.array([[by.get((value, r), math.nan) for r in repeats] for value in self.values])

    def mean(self, name: str) -> tuple[Array, Array]:
        """Return the mean over repeats for each value, and its standard error."""
        found = self.of(name)
        return found.mean(axis=1), found.std(axis=1, ddof=1) / math.sqrt(found.shape[1])

    def interval(self, name: str, confidence: float = 0.95) -> tuple[Array, Array, Array]:
        """Return the middle for each value and the ends of Student's interval over repeats.

        Of errors it is the mean; of all else, which is positive and spread over decades, the geometric one.
        """
        found = self.of(name)
        log = name not in _SHARES
        found = np.log(np.where(found > 0, found, np.nan)) if log else found
        middle, root = found.mean(axis=1), math.sqrt(found.shape[1])
        half = float(stats.t.ppf(0.5 + confidence / 2, found.shape[1] - 1)) * found.std(axis=1, ddof=1) / root
        ends = (middle, middle - half, middle + half)
        return tuple(np.exp(end) for end in ends) if log else ends

    @property
    def threshold(self) -> Threshold:
        """The interpolation threshold."""
        values = self.values
        fitted = self.of("train_loss") < EXACT if self.model != "task" else self.of("train_error") == 0
        if self.vary == "samples":  # fewer examples are easier to fit
            values, fitted = values[::-1], fitted[::-1]
        repeats = []
        for own in fitted.T:
            failed = np.flatnonzero(~own)
            last = int(failed[-1]) if len(failed) else -1
            near = float(values[last]) if last >= 0 else (0.0 if self.vary != "samples" else math.inf)
            beyond = math.inf if self.vary != "samples" else 0.0
            far = float(values[last + 1]) if last + 1 < len(values) else beyond
            repeats.append((min(near, far), max(near, far)))
        return Threshold(
            lower=min(low for low, _ in repeats), upper=max(high for _, high in repeats), repeats=tuple(repeats)
        )

    def peak(self, name: str = "test_loss") -> Peak | None:
        """Return the point that stands highest above the lowest ones on both its sides; None if there is none.

        Args:
            name: a field of `DescentRow`.
        """
        found, log = self.of(name), name not in _SHARES
        found = np.log(np.where(found > 0, found, np.nan)) if log else found
        mean = np.where(np.isfinite(found).all(axis=1), found.mean(axis=1), np.nan)
        best: tuple[float, int, int, int] | None = None
        for i in range(1, len(mean) - 1):
            if not (np.isfinite(mean[i]) and np.isfinite(mean[:i]).any() and np.isfinite(mean[i + 1 :]).any()):
                continue
            left, right = int(np.nanargmin(mean[:i])), i + 1 + int(np.nanargmin(mean[i + 1 :]))
            above = float(mean[i] - max(mean[left], mean[right]))
            if above > 0 and (best is None or above > best[0]):
                best = (above, i, left, right)
        if best is None:
            return None
        _, i, left, right = best
        root = math.sqrt(found.shape[1])
        rise, fall = found[i] - found[left], found[i] - found[right]
        return Peak(
            value=float(self.values[i]),
            height=float(np.exp(mean[i]) if log else mean[i]),
            before=float(self.values[left]),
            rise=float(rise.mean()),
            rise_stderr=float(rise.std(ddof=1)) / root,
            after=float(self.values[right]),
            fall=float(fall.mean()),
            fall_stderr=float(fall.std(ddof=1)) / root,
            dof=found.shape[1] - 1.0,
        )

    def resolved(self) -> Array:
        """Return, for each value, whether the condition number stays away from where float64 ends.

        Above a twentieth of 1 / (size x 2.2e-16) the smallest eigenvalue other than zero cannot be told from rounding,
        and the condition number is known from below only.
        """
        outputs = self.num_classes * self.of("num_samples")
        size = np.minimum(self.of("num_params"), outputs) / (1 if self.model == "task" else self.num_classes)
        with np.errstate(invalid="ignore"):
            return np.asarray((self.of("condition") < 0.05 / (size * np.finfo(float).eps)).all(axis=1))

    @property
    def diverged(self) -> int:
        """Trainings whose outputs are not finite."""
        return int((~np.isfinite(self.of("train_loss"))).sum())

    def unsettled(self) -> tuple[float, ...]:
        """Return the values at which the networks neither fit their labels nor have come to rest, on average.

        Those with a training that diverged are among them.
        """
        error, gradient = self.mean("train_error")[0], self.mean("gradient")[0]
        return tuple(
            float(v) for v, e, g in zip(self.values, error, gradient, strict=True) if not (e <= 0 or g <= UNSETTLED)
        )

    def summary(self) -> dict[str, Any]:
        """Return the main numbers."""
        peak, threshold = self.peak(), self.threshold
        return {
            "threshold_lower": threshold.lower,
            "threshold_upper": threshold.upper,
            "peak": math.nan if peak is None else peak.value,
            "standing": math.nan if peak is None else peak.standing,
        }
