"""The trace of a matrix by Hutch++: exact on a subspace that holds most of it, Hutchinson's estimator on the rest.

tr(Q'AQ) plus the mean of z'(I - QQ') A (I - QQ') z over probes that Q does not depend on, Q spanning the products of s
other probes. s is chosen from a pilot, whose probes are those of Q: how much of a product is left outside the range of
s others tells the variance with a basis of s, for every s. Probes of the pilot that Q does not need are dropped, so
that neither Q nor s depends on the probes of the mean, and a budget's estimate is unbiased.

Reference: Meyer, Musco, Musco and Woodruff (2021), Hutch++: optimal stochastic trace estimation, algorithm 1; Persson,
Cortinovis and Kressner (2022), Improved variants of the Hutch++ algorithm for trace estimation, for the choice of
sizes.
"""

from __future__ import annotations

import math

from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.validate import check_count
from curvature.linalg.stochastic._probe_plan import cheapest, most_accurate
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import (
    FEWEST,
    Goal,
    Samples,
    exact,
    sketch_by_pilot,
    summary,
    worth_completing,
)
from curvature.results.estimates import Status, TraceEstimate


def hutchpp(pool: ProbePool, goal: Goal, sketch_size: int | None) -> TraceEstimate:
    """Return the estimate from an empty pool; `sketch_size` is s, at most num_matvecs / 2 - 1. Default: chosen.

    Cost: 2 products for each of s, one for each other probe. Memory: 2 vectors a probe, 2 more for each of s.
    """
    if sketch_size is not None and goal.rtol is not None:
        raise InputError("sketch_size goes with num_matvecs (a budget); with rtol it is chosen on the way.")
    if pool.n <= goal.budget and (goal.rtol is None or pool.n <= FEWEST):
        return exact(pool, goal)
    if sketch_size is None:
        sketch_by_pilot(pool, goal.budget, lambda curve: _best_size(pool, goal, curve), fewest=_fewest(goal))
    else:
        check_count("sketch_size", sketch_size, 0, goal.budget // 2 - 1)
        pool.add_probes(sketch_size)
        pool.sketch(sketch_size)
    return _sampled(pool, goal)


def _best_size(pool: ProbePool, goal: Goal, curve: Tensor) -> int:
    """Return the size of the basis that suits the goal, by what a pilot shows; or make all of A known, and return 0."""
    k = pool.num_probes
    if goal.rtol is None:
        return most_accurate(curve, goal.budget - k, fewest=_fewest(goal))
    plain = Samples((pool.probes * pool.products).sum(dim=0), 0.0, "hutchinson")
    target = goal.target(summary(pool, plain, goal))
    best, samples = cheapest(curve, float(plain.values.var()) if k > 1 else 0.0, 0, target, fewest=FEWEST)
    if worth_completing(pool, int(min(samples, goal.budget)) + best, goal):
        pool.complete()
        return 0
    return best


def _fewest(goal: Goal) -> int:
    return max(min(FEWEST, goal.budget // 3), 2)


def _sampled(pool: ProbePool, goal: Goal) -> TraceEstimate:
    """Draw probes that the basis does not depend on: all that the budget allows, or until they are accurate."""
    more = goal.budget if goal.rtol is None else FEWEST
    while True:
        if pool.rank < pool.n:
            pool.add_probes(min(more, goal.budget - pool.num_matvecs))
        estimate = summary(pool, _sample(pool), goal)
        left = goal.budget - pool.num_matvecs
        if goal.rtol is None or estimate.status is Status.CONVERGED or left <= 0:
            return estimate
        k = len(estimate.samples)
        more = max(math.ceil(k * min((float(estimate.stderr) / goal.target(estimate)) ** 2 - 1, 0.5)), 1)
        if worth_completing(pool, math.ceil(k * (float(estimate.stderr) / goal.target(estimate)) ** 2) - k, goal):
            pool.complete()


def _sample(pool: ProbePool) -> Samples:
    explained = (pool.basis * pool.images).sum()
    return Samples(pool.trace_samples()[0][pool.num_sketched :], 0.0, "hutch++", explained)
