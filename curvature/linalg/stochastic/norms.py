"""The Frobenius norm of a matrix by random probes, and its spectral norm between bounds.

Frobenius: |A|_F^2 = E|A z|^2 for E[zz'] = I. With an orthonormal Q the part |A Q|_F^2 is exact and the rest is
E|A (I - QQ') z|^2, whose samples A z - (A Q) (Q'z) need no product beyond those with z and Q.

Spectral: the Lanczos vectors are polynomials in A of the start, q_{k+1} = p_k(A) q_1, so that along a unit eigenvector
u of eigenvalue lambda |p_k(lambda)| |u'q_1| = |u'q_{k+1}| <= 1. For q_1 uniform on the sphere (u'q_1)^2 follows
Beta(1/2, (n-1)/2) and exceeds its quantile delta^2 with the stated probability; beyond the Ritz values theta_j
|p_k(t)| = prod |t - theta_j| / prod beta_j increases, hence lambda_max <= t where |p_k(t)| = 1 / delta, and likewise
lambda_min. This holds for indefinite A as it stands, and for all k under the one event.

Reference: van Dorsselaer, Hochstenbach and van der Vorst (2000), Computing probabilistic bounds for extreme eigenvalues
of symmetric matrices with the Lanczos method; Kuczynski and Wozniakowski (1992), Estimating the largest eigenvalue by
the power and Lanczos algorithms with a random start, for the number of products that suffice whatever the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy  # whose parts are imported when used
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.places import normal_rows
from curvature.linalg.base.validate import check_count, check_square, noise_level, rounding_level
from curvature.linalg.krylov._lanczos_process import LanczosProcess
from curvature.linalg.stochastic._probe_plan import most_accurate
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import FEWEST, sketch_by_pilot
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import Estimate, NormBounds, Status, mean_and_stderr
from curvature.results.intervals import skewness

_LARGEST_LOG = 700.0  # exp of more overflows


@numerics
def frobenius_norm(
    A: AnyMatrix,
    *,
    matrix: MatrixName = "hessian",
    num_matvecs: int,
    generator: AnyGenerator,
    sketch_size: int | None = None,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> Estimate:
    """Estimate |A|_F = (sum_ij A_ij^2)^(1/2) with its standard error.

    Variance of |A z|^2 for signs: 2 (|A'A|_F^2 - sum_i (A'A)_ii^2), fourth powers of the eigenvalues: a few outliers
    rule it. A basis from s of the products takes them out, at 2 products each; s is chosen by what the products of a
    pilot show to lie outside the range of others, and samples come from other probes. The standard error of the root is
    that of the square over 2 |A|_F, the first order in it. |A|_F of a Hessian rules the error of Hutchinson's trace.

    Where few eigenvalues rule, samples are skewed as squares of few normal numbers are, and the standard error is too
    small by up to a third with 5 to 30 of them. Intervals allow for it: of nominal 95 % 93 % and more cover.

    Cost: num_matvecs products; n where the budget allows as many, and then the norm is exact.

    Args:
        A: symmetric, (n, n). Without symmetry the estimate is still right, but the basis saves nothing.
        num_matvecs: products to spend, 4 at least.
        sketch_size: s, at most num_matvecs / 2 - 1. Default: chosen.
        block_size: columns multiplied at a time.

    Examples:
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> frobenius_norm(A, num_matvecs=4, generator=0).value
        tensor(5.)
    """
    check_count("num_matvecs", num_matvecs, 4)
    A = as_matrix(A, matrix)
    pool = ProbePool(A, distribution="rademacher", generator=generator, block_size=block_size, callback=callback)
    if sketch_size is not None:
        check_count("sketch_size", sketch_size, 0, num_matvecs // 2 - 1)
    if pool.n <= num_matvecs:
        pool.complete()
        value = torch.linalg.matrix_norm(pool.images.double()).to(pool.images)
        return Estimate(value=value, stderr=torch.zeros_like(value), num_matvecs=pool.num_matvecs)
    fewest = max(min(2 * FEWEST, num_matvecs // 3), 2)  # squares of residuals are skewed
    if sketch_size is None:
        sketch_by_pilot(
            pool, num_matvecs, lambda c: most_accurate(c, num_matvecs - pool.num_probes, fewest=fewest), fewest=fewest
        )
    else:
        pool.add_probes(sketch_size)
        pool.sketch(sketch_size)
    pool.add_probes(num_matvecs - pool.num_matvecs)
    s = pool.num_sketched
    rest = pool.products[:, s:] - pool.images @ (pool.basis.T @ pool.probes[:, s:])
    # in double precision, since fourth powers leave the range of others
    squares = rest.double().square().sum(dim=0)
    mean, error = mean_and_stderr(squares)
    value = (pool.images.double().square().sum() + mean).sqrt()
    stderr = torch.where(value > 0, error / (2 * value).clamp_min(torch.finfo(value.dtype).tiny), 0)
    return Estimate(
        value=value.to(rest),
        stderr=stderr.to(rest),
        dof=len(squares) - 1.0,
        skewness=skewness(squares).to(rest),
        num_matvecs=pool.num_matvecs,
    )


@numerics
def spectral_norm(
    A: AnyMatrix,
    *,
    matrix: MatrixName = "hessian",
    rtol: float = 0.01,
    failure_probability: float = 1e-3,
    psd: bool = False,
    max_matvecs: int = 1000,
    generator: AnyGenerator,
    callback: Callable[[int, str], None] | None = None,
) -> NormBounds:
    """Return bounds on |A|_2 = max |lambda|: the lower one is certain, the upper one holds with stated probability.

    The lower one is the largest singular value of A on the Krylov space, the upper one is derived in the module. The
    run ends when they are within rtol of each other. For a positive definite A, Kuczynski and Wozniakowski bound what
    that takes: the probability that the largest Ritz value of k products is low by a share epsilon is at most 1.648
    n^(1/2) exp(-(2 k - 1) epsilon^(1/2)).

    Cost: one product a step; k vectors of memory, since the basis is kept orthonormal.

    Args:
        rtol: run until upper <= (1 + rtol) lower.
        failure_probability: that the upper bound is too low, in (0, 1), over the random start.
        psd: A is positive semi-definite: the low end of the spectrum needs no bound. It is taken on trust.
        max_matvecs: most products to spend.

    Examples:
        >>> bounds = spectral_norm(torch.diag(torch.arange(100.0) - 80), generator=0)
        >>> bool(bounds.lower <= 80 <= bounds.upper)
        True
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    generator = as_generator(generator, A.device)
    check_count("max_matvecs", max_matvecs, 1)
    if not rtol > 0:
        raise InputError(f"rtol must be positive, got {rtol}.")
    if not 0 < failure_probability < 1:
        raise InputError(f"failure_probability must be in (0, 1), got {failure_probability}.")
    per_end = failure_probability if psd else failure_probability / 2
    log_delta = 0.5 * math.log(_least_square(n, per_end))
    start = normal_rows(A, 1, generator).T
    process, upper = LanczosProcess(A, start), torch.inf
    for k in range(1, max_matvecs + 1):
        process.step()
        alpha, beta = (torch.tensor(x[0], dtype=torch.float64) for x in (process.alpha, process.beta))
        lower = _norm_on_space(alpha, beta)
        bound = lower if process.over else _beyond(alpha, beta, log_delta, psd=psd)
        upper = min(upper, bound + rounding_level(A) * lower)
        if callback is not None:
            callback(k, f"{lower:.4g} to {upper:.4g}")
        reached = process.over or upper <= (1 + rtol) * lower
        if reached:
            break
    status = Status.CONVERGED if reached else Status.MAX_MATVECS
    if (noise := noise_level(A)) > rounding_level(A):  # by rounding of products
        lower, upper = (1 - noise) * lower, (1 + noise) * max(upper, lower)
        status = Status.WITHIN_NOISE if reached and upper > (1 + rtol) * lower else status
    return NormBounds(
        lower=start.new_tensor(lower),
        upper=start.new_tensor(max(upper, lower)),
        failure_probability=failure_probability,
        num_matvecs=k,
        status=status,
    )


def _least_square(n: int, probability: float) -> float:
    """Return what the square of one entry of a uniform unit vector of length n falls below with this probability."""
    return float(scipy.special.betaincinv(0.5, (n - 1) / 2, probability)) if n > 1 else 1.0


def _norm_on_space(alpha: Tensor, beta: Tensor) -> float:
    """Return |A Q|_2, Q the Lanczos basis: the norm of the tridiagonal matrix with the row beta_k e_k' below it."""
    k = len(alpha)
    T = torch.zeros(k + 1, k, dtype=alpha.dtype)
    T[:k] = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
    T[k, k - 1] = beta[-1]
    return float(torch.linalg.matrix_norm(T, ord=2))


def _beyond(alpha: Tensor, beta: Tensor, log_delta: float, *, psd: bool) -> float:
    """Return the largest |t| beyond the Ritz values at which |p_k(t)| delta = 1."""
    theta = torch.linalg.eigvalsh(torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1))
    logs = float(beta.log().sum()) - log_delta
    high = float(theta[-1]) + _root(theta[-1] - theta, logs)
    if psd:
        return high
    return max(high, _root(theta - theta[0], logs) - float(theta[0]))


def _root(distances: Tensor, logs: float) -> float:
    """Return x > 0 with sum log(x + distances) = logs, from above."""
    d = distances.numpy()
    high = math.exp(min(logs / len(d), _LARGEST_LOG))  # the root if all distances were zero
    low = max(high * 1e-300, 1e-300)
    if not np.log(high + d).sum() > logs:
        return high
    if np.log(low + d).sum() > logs:  # after very many steps
        return low
    root = scipy.optimize.brentq(lambda x: np.log(x + d).sum() - logs, low, high, rtol=1e-12)
    return float(root) * (1 + 1e-11)
