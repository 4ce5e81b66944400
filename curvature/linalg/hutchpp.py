"""The trace of a matrix by Hutch++: exact on a subspace that holds most of it, Hutchinson's estimator on the rest.

Reference: Meyer, Musco, Musco and Woodruff (2021), Hutch++: optimal stochastic trace estimation, algorithm 1; Persson,
Cortinovis and Kressner (2022), Improved variants of the Hutch++ algorithm for trace estimation, for the choice of
sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from curvature.arguments import checked
from curvature.autocast import full_precision
from curvature.errors import InputError
from curvature.linalg._probe_pool import ProbePool
from curvature.linalg._trace_estimate import Goal, Samples, open_pool, spend, summary
from curvature.linalg._validate import check_count
from curvature.linop import MatrixLike
from curvature.one_matrix import one_matrix
from curvature.results import EigenPairs, TraceEstimate

__all__ = ["hutchpp"]


@full_precision
@one_matrix
@checked
def hutchpp(
    A: MatrixLike,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    max_matvecs: int = 10_000,
    sketch_size: int | None = None,
    confidence: float = 0.95,
    eigenpairs: EigenPairs | None = None,
    distribution: str = "rademacher",
    generator: torch.Generator,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> TraceEstimate:
    """Estimate tr A as tr(Q'AQ) plus the mean of z'(I - QQ') A (I - QQ') z over probes that Q does not depend on.

    Q spans the products of s other probes. Its terms given Q are independent, so the standard error is a plain one; it
    is the estimator of choice where the error bar must hold by theorem. XTrace has the smaller error, since there the
    probes that made Q count as well.

    How many probes go into Q is found from the products known so far: how much of a product is left outside the range
    of s others tells the variance with a basis of s, for every s. Products are never repeated as it grows. A given
    `sketch_size` keeps the choice free of the samples altogether.

    Cost: 2 products for each of s, one for each other probe; n products where the budget allows as many, and then the
    trace is exact. Memory: 2 vectors a probe, 2 more for each of s.

    Args:
        A: square, (n, n); symmetry is not needed.
        num_matvecs: products to spend, 4 at least; or
        rtol: go on until the half width of the confidence interval is at most rtol |value|.
        max_matvecs: most products to spend on rtol.
        sketch_size: s, at most num_matvecs / 2 - 1, with a budget only. Default: chosen; num_matvecs // 3 is published.
        confidence: level of that interval, by Student's t.
        eigenpairs: pairs that are known, taken out before and added exactly.
        distribution: "rademacher", "normal" or "sphere".
        generator: source of the probes, on A's device.
        block_size: columns multiplied at a time.
        callback: called after each product with the products so far and a word on progress.

    Raises:
        InputError: unless exactly one of num_matvecs and rtol is given; for arguments out of range.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(0.5 ** torch.arange(100.0))
        >>> hutchpp(A, num_matvecs=60, generator=torch.Generator().manual_seed(0)).value.round(decimals=3)
        tensor(2.)
    """
    goal = Goal(num_matvecs=num_matvecs, rtol=rtol, max_matvecs=max_matvecs, confidence=confidence)
    pool, known = open_pool(
        A,
        distribution=distribution,
        generator=generator,
        eigenpairs=eigenpairs,
        block_size=block_size,
        callback=callback,
    )
    if sketch_size is None or (num_matvecs is not None and num_matvecs >= pool.n):
        return spend(pool, known, goal, _sample, price=2)
    if num_matvecs is None:
        raise InputError("sketch_size goes with num_matvecs (a budget); with rtol it is chosen on the way.")
    check_count("sketch_size", sketch_size, 0, num_matvecs // 2 - 1)
    pool.add_probes(num_matvecs - sketch_size)
    pool.sketch(sketch_size)
    return summary(pool, _sample(pool), known, goal)


def _sample(pool: ProbePool) -> Samples:
    return Samples(pool.trace_samples()[0][pool.num_sketched :], 0.0, "hutch++")
