"""What the estimators of the trace share: their settings, their summary, and the loop that spends products well."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.validate import check_count, product_noise
from curvature.linalg.stochastic._probe_plan import cheapest, most_accurate, residual_curve, with_left_out
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.results.estimates import Status, TraceEstimate
from curvature.results.intervals import skewness

FEWEST = 8  # samples before a standard error is believed
_DOUBT = 2  # by how much a forecast from few samples may be too high
_SELECTION = 1.5  # found on the spectra of `benchmarks.coverage.bench`: 91 % covered without it, 93 % with it
_EXPLORE = 4  # a share of n products is spent before all n are: a basis may yet turn out to hold most of A


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A budget or an accuracy: how far an estimator goes."""

    num_matvecs: int | None
    rtol: float | None
    max_matvecs: int
    confidence: float
    least: int = 4
    """Fewest products that make an estimate with an error."""

    def __post_init__(self) -> None:
        if (self.num_matvecs is None) == (self.rtol is None):
            raise InputError("give exactly one of num_matvecs (a budget) and rtol (an accuracy).")
        if self.rtol is not None and not self.rtol > 0:
            raise InputError(f"rtol must be positive, got {self.rtol}.")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must be in (0, 1), got {self.confidence}.")
        if self.num_matvecs is not None:
            check_count("num_matvecs", self.num_matvecs, self.least)
        check_count("max_matvecs", self.max_matvecs, self.least)

    @property
    def budget(self) -> int:
        """Most products to spend."""
        return self.max_matvecs if self.num_matvecs is None else self.num_matvecs

    def met(self, estimate: TraceEstimate) -> bool:
        """Whether the accuracy asked for is reached, with samples enough to believe it."""
        if self.rtol is None or not (len(estimate.samples) >= FEWEST or estimate.method == "exact"):
            return False
        return bool(estimate.half_width(self.confidence) <= self.rtol * estimate.value.abs())

    def target(self, estimate: TraceEstimate) -> float:
        """Return the standard error that is wanted. A value lost in its own error is taken to be of that size."""
        assert self.rtol is not None
        half_width, stderr = float(estimate.half_width(self.confidence)), float(estimate.stderr)
        quantile = half_width / stderr if stderr > 0 else 2.0
        return self.rtol * max(abs(float(estimate.value)), half_width / 2) / quantile


@dataclass(frozen=True)
class Samples:
    """One estimate a probe, the sum of the covariances of all pairs, and the name of the estimator."""

    values: Tensor
    covariance: Tensor | float
    method: str
    fixed: Tensor | float = 0.0
    """The part of the values that is the same whatever the probes are."""

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, ().

        With e the sum of squared deviations and c that of the covariances, both of k, the variance of the mean is
        (E e + c) / (k (k - 1)). A c that is estimated to be negative counts as zero.
        """
        k = len(self.values)
        if k < 2:
            return torch.full_like(self.values.sum(), torch.inf)
        shared = torch.as_tensor(self.covariance, dtype=self.values.dtype, device=self.values.device).clamp_min(0)
        return ((self.values.var() + shared / (k - 1)) / k).sqrt()


def summary(pool: ProbePool, samples: Samples, goal: Goal) -> TraceEstimate:
    """Return the mean of the samples with its standard error; exact once the basis spans the space."""
    values, method = samples.values + pool.known.trace, samples.method
    if pool.rank == pool.n:
        exact = (pool.basis * pool.images).sum() + pool.known.trace
        values, method = exact.repeat(max(len(values), 2)), "exact"
    stderr = torch.zeros_like(values[0])
    if method != "exact":
        alike = pool.alike(len(values))
        # having ended the run by being small, it is too small
        selected = 1.0 if goal.rtol is None else 1 + _SELECTION / len(values)
        stderr = torch.full_like(stderr, torch.inf) if alike else samples.stderr * selected
    estimate = TraceEstimate(
        value=values.mean().to(pool.basis),
        stderr=stderr.to(pool.basis),
        num_matvecs=pool.num_matvecs,
        samples=values.to(pool.basis),
        status=Status.BUDGET if goal.rtol is None else Status.MAX_MATVECS,
        method=method,
        dof=math.inf if method == "exact" else len(values) - 1.0,
        skewness=skewness(values, samples.fixed + pool.known.trace).to(pool.basis),
    )
    return replace(estimate, status=Status.CONVERGED) if goal.met(estimate) else estimate


def with_noise(pool: ProbePool, goal: Goal, estimate: TraceEstimate) -> TraceEstimate:
    """Return the estimate, with the rounding error of products in its standard error and status.

    Traces of networks in bfloat16 and float16 erred by up to 0.3 times the noise of products, of |A|_F or the trace.
    """
    if not (noise := product_noise(pool.A)):
        return estimate
    sizes = torch.linalg.vector_norm(pool.products, dim=0)  # each about |A|_F
    scale = torch.cat([estimate.value.abs()[None], sizes.mean()[None]] if len(sizes) else [estimate.value.abs()[None]])
    stderr = torch.hypot(estimate.stderr, noise / 2 * scale.max())
    noisy = replace(estimate, stderr=stderr, product_noise=noise)
    is_within = estimate.status is Status.CONVERGED and not goal.met(noisy)
    return replace(noisy, status=Status.WITHIN_NOISE) if is_within else noisy


def exact(pool: ProbePool, goal: Goal) -> TraceEstimate:
    """Return the trace from n products."""
    pool.complete()
    return summary(pool, Samples(pool.probes.new_zeros(0), 0.0, "exact"), goal)


def enlarge(pool: ProbePool, goal: Goal, sample: Callable[[ProbePool], Samples], *, price: int) -> TraceEstimate:
    """Run an estimator that has one size, k probes at `price` products each: the budget's, or grown until accurate.

    Where k probes would cost what knowing all of A costs, all of A is made known.
    """
    size = goal.budget // price if goal.rtol is None else FEWEST
    while True:
        size = min(size, goal.budget // price)
        ahead = (size - pool.num_probes) * price
        if _worth_completing(pool, pool.n if size >= pool.n else ahead, goal):
            return exact(pool, goal)
        pool.add_probes(size - pool.num_probes)
        estimate = summary(pool, sample(pool), goal)
        if goal.rtol is None or estimate.status is Status.CONVERGED or size == goal.budget // price:
            return estimate
        forecast = size * (float(estimate.stderr) / goal.target(estimate)) ** 2
        size = math.ceil(min(2 * size, max(1.25 * size, forecast)))  # samples may be skewed, and looks select


def sketch_by_pilot(pool: ProbePool, budget: int, choose: Callable[[Tensor], int], *, fewest: int) -> None:
    """Draw probes for a basis as long as more of them save products, and forget those it does not need.

    Probes drawn later, `fewest` at least, have no part in the basis or its size, which `choose` takes from the pilot's
    `residual_curve`, so that samples from them are independent and unbiased.
    """
    pool.add_probes(max(min(FEWEST, budget // 3), 1))
    while True:
        k = pool.num_probes
        best = choose(residual_curve(pool.products))
        more = min(max(k // 2, 1), (budget - fewest) // 2 - k)
        if best < k or more <= 0:
            break
        pool.add_probes(more)
    pool.sketch(best)
    pool.drop_unsketched()


def spend(pool: ProbePool, goal: Goal, sample: Callable[[ProbePool], Samples]) -> TraceEstimate:
    """Run an estimator that may use k probes and a basis from any s of them, and choose k and s as it learns."""
    if goal.rtol is None:
        if _worth_completing(pool, goal.budget, goal):
            return exact(pool, goal)
        spend_budget(pool, goal.budget, lambda c, best: _nystrom_wins(pool, sample(pool), c, best, goal.budget))
        return summary(pool, sample(pool), goal)
    if pool.n <= min(FEWEST, goal.budget):
        return exact(pool, goal)
    pool.add_probes(min(FEWEST, goal.budget))
    while True:
        estimate = summary(pool, sample(pool), goal)
        if estimate.status is Status.CONVERGED or pool.num_matvecs >= goal.budget:
            return estimate
        variance = float(estimate.stderr) ** 2 * len(estimate.samples)
        advance(pool, goal, variance, goal.target(estimate), may_sketch=estimate.method != "xnystrace")


def advance(
    pool: ProbePool, goal: Goal, variance: float, target: float, *, may_sketch: bool = True, price: int = 1
) -> None:
    """Multiply what brings the standard error to its target soonest: a larger basis, more probes, or all of A."""
    k, s, left = pool.num_probes, pool.num_sketched, goal.budget - pool.num_matvecs
    curve = with_left_out(residual_curve(pool.products), k)
    best, samples = cheapest(curve, variance, s, target, fewest=FEWEST)
    more, best = math.ceil(min(samples, goal.budget)) - k, min(best, s + left, k)
    if worth_completing(pool, max(more, 0) + max(best - s, 0), goal):
        pool.complete()
    elif may_sketch and best > s:
        pool.sketch(best)
    else:
        pool.add_probes(min(max(more, 1), max(k // 2, 1), left // price))


def spend_budget(pool: ProbePool, budget: int, probes_only: Callable[[Tensor, int], bool] = lambda *_: False) -> None:
    """Draw probes until what is left of the budget is best spent on the basis; only then multiply that."""
    pool.add_probes(min(FEWEST, budget // 2 + 1))
    while True:
        curve, k = residual_curve(pool.products), pool.num_probes
        best = most_accurate(with_left_out(curve, k), budget, fewest=min(FEWEST, budget // 2))
        missing = budget - best - k
        if missing <= 0 and probes_only(curve, best):
            missing = budget - k
        if missing <= 0:
            break
        pool.add_probes(min(missing, max(k // 2, 1)))
    pool.sketch(budget - pool.num_matvecs)


def _nystrom_wins(pool: ProbePool, samples: Samples, curve: Tensor, best: int, budget: int) -> bool:
    """Whether XNysTrace is likely to end with a smaller error from all probes than a basis from `best` of them."""
    if samples.method != "xnystrace":
        return False
    k = pool.num_probes
    ahead = budget - k
    decay = curve[k] / curve[max(k - ahead, 0)] if curve[max(k - ahead, 0)] > 0 else curve.new_ones(())
    gain = curve[best] / curve[0] if curve[0] > 0 else curve.new_ones(())
    nystrom = samples.stderr.square() * float(decay) * k / budget
    mixed = pool.trace_samples()[0].var() * float(gain) / (budget - best)
    return bool(nystrom <= mixed)


def worth_completing(pool: ProbePool, forecast: int, goal: Goal) -> bool:
    """Whether a forecast, from few samples as a rule, says that n products are the cheaper way."""
    explored = _EXPLORE * pool.num_matvecs >= pool.n
    return explored and _worth_completing(pool, forecast // _DOUBT, goal)


def _worth_completing(pool: ProbePool, ahead: int, goal: Goal) -> bool:
    """Whether the products ahead would be no fewer than those that make A known in full."""
    missing = pool.n - pool.rank
    return ahead >= missing and goal.budget - pool.num_matvecs >= missing
