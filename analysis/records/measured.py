"""Numbers with what is known of their errors: estimates, residuals, and numbers between bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvature.results.intervals import mean_interval
from curvature.results.record import Result
from curvature.spectra.results import SpectrumEstimate

__all__ = ["Bounded", "Measured"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Measured(Result):
    """A number and how well it is known."""

    value: float
    """The estimate; its unit is that of the field that holds it. NaN where it is not defined (0 / 0)."""
    stderr: float
    """One standard error: the spread over the probes, the error of the quadrature and residuals, root of squares."""
    data_stderr: float = math.nan
    """One standard error over other data of the same size, by the jackknife; NaN where it is not known."""
    residual: bool = False
    """Whether `stderr` is the residual of an eigenvalue, a bound on the error instead of a standard error."""
    dof: float = math.inf
    """Degrees of freedom of `stderr`: samples less one; infinite where it is known."""
    data_dof: float = math.inf
    """Degrees of freedom of `data_stderr`."""
    skewness: float = 0.0
    """Of the samples that `stderr` is the spread of; dimensionless."""

    @classmethod
    def of(cls, estimate: SpectrumEstimate) -> Measured:
        """Return a single number that followed from a spectrum."""
        stderr, dof = estimate.error
        data_stderr = math.nan if estimate.data_stderr is None else float(estimate.data_stderr)
        return cls(
            value=float(estimate.value),
            stderr=stderr,
            data_stderr=data_stderr,
            dof=dof,
            data_dof=estimate.data_dof,
            skewness=float(estimate.skewness),
        )

    def __format__(self, spec: str) -> str:
        """Return "value ± stderr", both in the format asked for; the value alone where it is exact or has no error."""
        spec = spec or ".5g"
        value = format(self.value, spec)
        return value if self.stderr == 0 or math.isnan(self.stderr) else f"{value} ± {format(self.stderr, spec)}"

    def __str__(self) -> str:
        return format(self)

    def _brief(self) -> str:
        return format(self)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of `stderr`, that of these very data: `mean_interval`, or the bound where it is one."""
        if self.residual:
            return self.value - self.stderr, self.value + self.stderr
        return mean_interval(self.value, self.stderr, dof=self.dof, skewness=self.skewness, confidence=confidence)


@dataclass(frozen=True, kw_only=True, repr=False)
class Bounded(Measured):
    """A number that is known between bounds: `value` +- 2 `stderr` reaches to the further of them."""

    lower: float = -math.inf
    """It is no smaller, ..."""
    upper: float = math.inf
    """... and no larger than this, with 95 % confidence where probes have a part in it."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bounds, whatever the confidence."""
        del confidence
        return self.lower, self.upper

    @classmethod
    def between(cls, lower: float, upper: float, value: float | None = None) -> Bounded:
        """Return what lies between these bounds, in their middle by default."""
        value = (lower + upper) / 2 if value is None else value
        return cls(value=value, stderr=max(upper - value, value - lower) / 2, lower=lower, upper=upper)

    def over(self, other: Bounded) -> Bounded:
        """Return the ratio of this to another, both positive."""
        if not other.lower > 0:
            return Bounded.between(math.nan, math.nan)
        lower, upper = self.lower / other.upper, self.upper / other.lower
        return Bounded.between(lower, upper, min(max(self.value / other.value, lower), upper))
