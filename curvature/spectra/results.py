"""What is known of a symmetric matrix once its spectrum was measured: values, and the three ways each may be off.

Chance in the probes, the rule that stands for the whole density, and chance in the data are kept apart. All numbers
follow from quadratures, with no further product.

Reference: Golub and Meurant (2010), Matrices, Moments and Quadrature with Applications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.linalg.stochastic.quadrature import Quadrature
from curvature.linalg.stochastic.slq import blur, envelope, error_of_noise, extrapolated, smoothed
from curvature.results.estimates import EigenPairs, Estimate, SpectralDensity, Status, TraceEstimate, mean_and_stderr
from curvature.results.intervals import combined_error, mean_interval, skewness
from curvature.results.jackknife import jackknife_stderr
from curvature.results.record import Result

__all__ = ["DataSpread", "Spectrum", "SpectrumEstimate"]

Samples = Callable[[Tensor, Tensor], Tensor]
"""From nodes (m,) and weights (p, m) of a quadrature to one value a probe, (p, ...)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectrumEstimate(Estimate):
    """A number that follows from a spectrum, and the three ways in which it may be off.

    `stderr` is zero where all entries of the matrix were computed; `data_stderr` None where the data came in too few
    batches.
    """

    rule: Tensor
    """Error of the quadrature, judged by half and by two thirds of the steps: the larger of a third and of four fifths
    of what they change, which is right for errors that fall as steps^-2, as that of |t| does; and what products below
    float32 change."""

    @property
    def error(self) -> tuple[float, float]:
        """Root of the squares of `stderr` and `rule` of a single number, and its degrees of freedom."""
        return combined_error([(float(self.stderr), self.dof), (float(self.rule), math.inf)])

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:  # type: ignore[override]
        """Return the interval that covers a single number with this probability: `mean_interval`, beyond it the rule.

        The error of the quadrature has no known distribution and is added to both ends.
        """
        rule = float(self.rule)
        low, high = mean_interval(
            float(self.value), float(self.stderr), dof=self.dof, skewness=float(self.skewness), confidence=confidence
        )
        return low - rule, high + rule


@dataclass(frozen=True, kw_only=True, repr=False)
class DataSpread(Result):
    """The spectrum without each of G groups of the data in turn, in the space that all data span."""

    shares: Tensor
    """(G,), share of each group in the total weight."""
    top: Tensor
    """(G, k), largest eigenvalues, descending."""
    bottom: Tensor
    """(G, b), smallest eigenvalues, descending."""
    rules: tuple[Quadrature, ...]
    """G quadratures."""
    fraction: float
    """Share of all data of interest that was seen."""

    def stderr(self, value: Tensor, without: Sequence[Tensor]) -> Tensor:
        """Return the standard error over the data of a value whose replicates are known."""
        of_sample = jackknife_stderr(value.double(), torch.stack(list(without)).double(), self.shares)
        return (1 - self.fraction) ** 0.5 * of_sample

    def stderr_of_mean(self, samples: Tensor, without: Sequence[Tensor]) -> Tensor:
        """Return the same for a mean over p probes, (p, ...), less what the probes' own noise adds to it.

        With V the variance over the data and N that which a probe adds, the jackknife of the mean estimates V + N / p
        and those of single probes V + N. What is left of the first is no less than its p-th part.
        """
        p, stacked = len(samples), torch.stack(list(without))
        of_mean = self.stderr(samples.mean(dim=0), list(stacked.mean(dim=1))).square()
        if p == 1:
            return of_mean.sqrt()
        of_probes = self.stderr(samples, list(stacked)).square().mean(dim=0)
        return torch.maximum((p * of_mean - of_probes) / (p - 1), of_mean / p).sqrt()


@dataclass(frozen=True, kw_only=True, repr=False)
class Spectrum(Result):
    """What is known of a symmetric matrix A of size n."""

    _figure = "plot_spectral_density"

    top: EigenPairs
    """The largest eigenvalues, descending."""
    bottom: EigenPairs
    """The smallest, descending."""
    density: SpectralDensity
    """The density of all; the largest are exact nodes of it."""
    rule: Quadrature
    """What the density smooths."""
    coarse: tuple[Quadrature, ...]
    """The same from the first half and from the first two thirds of the steps."""
    exact: bool
    """Whether A was computed entry by entry, which leaves rounding as the only error."""
    rounding: float
    """How far rounding may have moved an eigenvalue; units of A."""
    spread: DataSpread | None
    """What the data's own chance makes of it; None if they came in too few batches, see `notes`."""
    layer_trace_samples: Tensor | None
    """(L, p), one unbiased estimate a probe of the trace of each layer's diagonal block; None without layers."""
    num_matvecs: int
    """Products that were spent; for a diagonal block, products with that block."""
    seconds: float
    """Wall-clock time, s; of layers, that of all of them."""
    notes: tuple[str, ...]
    """What a reader should know."""

    def estimate(self, samples: Samples) -> SpectrumEstimate:
        """Return a number from its value for each probe, with all its uncertainties.

        Args:
            samples: acts on nodes (m,) and weights (p, m), whose rows sum to 1, and returns (p, ...); e.g. for the
                mean of |lambda|: `lambda x, w: (w * x.abs()).sum(dim=1)`.
        """
        of_probes = samples(self.rule.nodes, self.rule.weights)
        value, stderr = mean_and_stderr(of_probes)
        rule = self.rule_error(value, [samples(r.nodes, r.weights).mean(dim=0) for r in self.coarse])
        noise, (x, w) = self.top.product_noise, (self.rule.nodes, self.rule.weights)
        rule = rule + error_of_noise(noise, x, w, self.density.dimension, lambda x: samples(x, w).mean(dim=0))
        data = None
        if self.spread is not None:
            data = self.spread.stderr_of_mean(of_probes, [samples(r.nodes, r.weights) for r in self.spread.rules])
        if self.exact:
            stderr = torch.zeros_like(value)
        return SpectrumEstimate(
            value=value,
            stderr=stderr,
            rule=rule,
            data_stderr=data,
            dof=self.dof,
            data_dof=math.inf if self.spread is None else len(self.spread.shares) - 1.0,
            skewness=0.0 if self.exact else skewness(of_probes),
            product_noise=noise,
        )

    @property
    def dof(self) -> float:
        """Degrees of freedom of standard errors over the probes; infinite where all entries were computed."""
        return math.inf if self.exact else len(self.rule.weights) - 1.0

    def spectral_sum(self, f: Callable[[Tensor], Tensor]) -> SpectrumEstimate:
        """Return tr f(A) = sum_i f(lambda_i); f acts entrywise. With f(x) = x the trace, x^2 the squared norm.

        Of nominal 95 % intervals 92 % and more cover (docs/benchmarks.md).
        """
        n, rule = self.density.dimension, self.rule
        found = self.estimate(lambda x, w: n * (w * f(x)).sum(dim=1))
        if self.exact:
            return found
        chance = n * (rule.weights * f(rule.nodes).where(~rule.is_known, 0)).sum(dim=1)
        return replace(found, skewness=float(skewness(chance)))

    def trace(self) -> TraceEstimate:
        """Return tr A with its standard error over the probes, and the rounding error of products, as `trace`."""
        samples = self.density.dimension * (self.rule.weights * self.rule.nodes).sum(dim=1)
        value, stderr = mean_and_stderr(samples)
        stderr, noise = torch.zeros_like(value) if self.exact else stderr, self.top.product_noise
        if noise is not None:
            size = (self.density.dimension * (self.rule.weights * self.rule.nodes.square()).sum(dim=1)).mean().sqrt()
            stderr = torch.hypot(stderr, noise / 2 * torch.maximum(value.abs(), size))
        return TraceEstimate(
            value=value,
            product_noise=noise,
            stderr=stderr,
            num_matvecs=self.num_matvecs,
            samples=samples,
            status=Status.CONVERGED if self.exact else Status.BUDGET,
            method="exact" if self.exact else "hutchinson",
            dof=self.dof,
            skewness=0.0 if self.exact else skewness(samples, self.rule.known.sum()),
        )

    def frobenius_norm(self) -> SpectrumEstimate:
        """Return |A|_F = (sum_i lambda_i^2)^(1/2), its errors to first order."""
        square = self.spectral_sum(torch.square)
        norm = square.value.sqrt()
        factor = 0.5 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        data = None if square.data_stderr is None else factor * square.data_stderr
        return replace(square, value=norm, stderr=factor * square.stderr, rule=factor * square.rule, data_stderr=data)

    def top_data_stderr(self) -> Tensor | None:
        """Return how far each of the largest eigenvalues would move with other data of the same size, (k,)."""
        return self._pairs_data_stderr(self.top, None if self.spread is None else self.spread.top)

    def bottom_data_stderr(self) -> Tensor | None:
        """Return the same for the smallest, (b,)."""
        return self._pairs_data_stderr(self.bottom, None if self.spread is None else self.spread.bottom)

    def density_data_stderr(self) -> Tensor | None:
        """Return the same for the smoothed density at every point of its grid."""
        if self.spread is None:
            return None
        without = [_smoothed(rule, self.density).density for rule in self.spread.rules]
        return self.spread.stderr(self.density.density, without)

    def density_rule_error(self) -> Tensor:
        """Return the error of the quadrature in the smoothed density, at every point of its grid."""
        error = self.rule_error(self.density.density, [_smoothed(r, self.density).density for r in self.coarse])
        error = error if self.exact else envelope(error, self.density.grid, self.rule.nodes, len(self.rule.nodes))
        return error + blur(self.density, noise) if (noise := self.density.product_noise) else error

    def layer_traces(self) -> SpectrumEstimate | None:
        """Return the trace of each layer's diagonal block, (L,); they need one block step only."""
        if self.layer_trace_samples is None:
            return None
        value, stderr = mean_and_stderr(self.layer_trace_samples, dim=1)
        lopsided = 0.0 if self.exact else skewness(self.layer_trace_samples.T)
        rule = torch.zeros_like(value)
        return SpectrumEstimate(value=value, stderr=stderr, rule=rule, dof=self.dof, skewness=lopsided)

    def rule_error(self, value: Tensor, from_fewer: Sequence[Tensor]) -> Tensor:
        """Return the error of the quadrature in a value, from what each rule of `coarse` gives instead."""
        return torch.zeros_like(value) if self.exact else extrapolated(value, from_fewer)

    def _pairs_data_stderr(self, pairs: EigenPairs, without: Tensor | None) -> Tensor | None:
        if self.spread is None or without is None:
            return None
        return self.spread.stderr(pairs.eigenvalues.cpu(), list(without))


def _smoothed(rule: Quadrature, like: SpectralDensity) -> SpectralDensity:
    """Smooth another rule on the same grid."""
    return smoothed(
        rule.nodes.expand(len(rule.weights), -1),
        rule.weights,
        n=like.dimension,
        num_steps=rule.num_steps,
        known=rule.known,
        num_matvecs=like.num_matvecs,
        sigma=like.sigma,
        grid=like.grid,
    )
