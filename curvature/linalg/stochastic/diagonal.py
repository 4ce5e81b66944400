"""The diagonal of a matrix: Hutchinson's estimator, diag A = E[z * Az] for random signs z, and XDiag.

XDiag is exact on a subspace, and uses every probe to make it and to see past it. With the pool of `_probe_pool` and P_i
on the range of all products but the i-th,

    d_i = diag(P_i A) + omega_i * (I - P_i) A omega_i

is unbiased for signs omega_i. A probe that had no part in the basis has P_i = Q Q'. As for traces the d_i are
correlated, and their spread is too small; the sum of their covariances over all entries is estimated, from estimates
that leave a neighbour out as well, and scales all standard errors alike. That sum scatters widely where the basis
hardly exceeds the rank, so that a share of the variance is added at least.

Reference: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix; Epperly, Tropp and Webber
(2024), XTrace (arXiv 2301.07825), on XDiag.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.validate import check_finite, product_noise, working_dtype
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import FEWEST, Goal, advance, spend_budget
from curvature.linalg.stochastic.probes import one_direction
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import DiagonalEstimate, EigenPairs, Status

_SHARED = 0.35  # the least that leave-one-out estimates' covariances add to the variance: 91 % cover a step without it
_NEIGHBOURS = 8  # pairs a probe, for the covariance: all of them would cost as many products of n-vectors as k^2
DiagonalMethod: TypeAlias = Literal["auto", "hutchinson", "xdiag"]


@numerics
def diagonal(
    A: AnyMatrix,
    *,
    matrix: MatrixName = "hessian",
    method: DiagonalMethod = "auto",
    rtol: float | None = None,
    num_matvecs: int | None = None,
    max_matvecs: int = 10_000,
    deflate: EigenPairs | None = None,
    generator: AnyGenerator,
    block_size: int = 1,
    keep_samples: bool = False,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> DiagonalEstimate:
    """Estimate diag A with a standard error for every entry, to an accuracy or as well as a budget allows.

    "hutchinson" spends all products on random signs. "xdiag" spends half on a basis of A's range, on which the diagonal
    is exact, and uses every sign vector for both; it wins wherever the spectrum decays. "auto" finds out from the
    products themselves how large a basis saves most, as `trace` does: the sum of the variances with a basis from s
    probes is at most the part of a product outside the range of s others. Where the budget reaches n the diagonal is
    exact.

    Known eigenpairs are taken out first, at no product, which removes their share from every row.

    Of nominal 95 % intervals 92 to 98 % cover. Entries of rows with one or two others off the diagonal are the
    exception with few probes: k samples agree by chance with a probability of up to 2^(1 - k), with an error of 0. With
    4 products 77 to 95 % of those are covered, with 12 92 to 98 %.

    Cost: one product a probe and one for each vector of the basis. Memory: two vectors for each of these, and one more
    a probe; two in all for "hutchinson" on a budget, without samples. Standard errors hold the rounding error of
    a model's products, half of it times the norm of a row; WITHIN_NOISE where that alone exceeds rtol.

    Args:
        method: "auto", "hutchinson" or "xdiag".
        rtol: go on until |stderr|_2 <= rtol |values|_2, with 8 probes at least; or
        num_matvecs: products to spend, 4 at least, 2 for "hutchinson". Exactly one of the two.
        max_matvecs: most products to spend on rtol.
        deflate: pairs that are known, from `eigsh`.
        block_size: columns multiplied at a time.
        keep_samples: keep one estimate a probe, (n, k), which standard errors of sums of entries need.

    Raises:
        InputError: unless exactly one of rtol and num_matvecs is given; for arguments out of range.

    Examples:
        >>> A = torch.outer(torch.arange(9.0), torch.arange(9.0))
        >>> diagonal(A, num_matvecs=8, generator=0).value.round()
        tensor([ 0.,  1.,  4.,  9., 16., 25., 36., 49., 64.])
    """
    saved = open_run("diagonal", locals())
    if method not in get_args(DiagonalMethod):
        raise InputError(f"method must be one of {', '.join(get_args(DiagonalMethod))}, got {method!r}.")
    least = 2 if method == "hutchinson" else 4
    goal = Goal(num_matvecs=num_matvecs, rtol=rtol, max_matvecs=max_matvecs, confidence=0.95, least=least)
    pool = ProbePool(
        as_matrix(A, matrix),
        distribution="rademacher",
        generator=generator,
        deflate=deflate,
        block_size=block_size,
        callback=callback,
        saved=saved,
    )
    if pool.n <= goal.budget and (goal.rtol is None or pool.n <= FEWEST):
        pool.complete()
    elif method == "hutchinson" and goal.rtol is None and not keep_samples:
        return _streamed(pool, goal)
    elif goal.rtol is None and method == "auto":
        spend_budget(pool, goal.budget)
    elif goal.rtol is None:
        pool.add_probes(goal.budget // 2 if method == "xdiag" else goal.budget)
        pool.sketch(min(goal.budget - pool.num_matvecs, pool.num_probes))
    else:
        return _reach(pool, goal, goal.rtol, method, keep_samples)
    return _summary(pool, goal, keep_samples)


def _reach(pool: ProbePool, goal: Goal, rtol: float, method: str, keep_samples: bool) -> DiagonalEstimate:
    """Spend products one step after another until the accuracy is reached."""
    price = 2 if method == "xdiag" else 1
    pool.add_probes(min(FEWEST, goal.budget // 2))
    while True:
        if method == "xdiag":
            pool.sketch(pool.num_probes)
        estimate = _summary(pool, goal, keep_samples)
        if estimate.status in (Status.CONVERGED, Status.WITHIN_NOISE) or goal.budget - pool.num_matvecs < price:
            return estimate
        error = _norm(estimate.stderr)
        target = rtol * max(_norm(estimate.value), error / 2)
        advance(pool, goal, error**2 * pool.num_probes, target, may_sketch=method == "auto", price=price)


def _summary(pool: ProbePool, goal: Goal, keep_samples: bool) -> DiagonalEstimate:
    if pool.rank == pool.n:
        values = (pool.basis * pool.images).sum(dim=1) + pool.known.diagonal
        stderr, D, method = torch.zeros_like(values), values[:, None].expand(-1, 2), "exact"
    else:
        D, covariance = _samples(pool)
        D = D + torch.as_tensor(pool.known.diagonal, dtype=D.dtype, device=D.device).reshape(-1, 1)
        values, stderr = D.mean(dim=1), _stderr_of_mean(D, covariance, pool.num_sketched)
        stderr = torch.full_like(stderr, math.inf) if one_direction(pool.probes) else stderr
        method = {0: "hutchinson", pool.num_probes: "xdiag"}.get(pool.num_sketched, "mixed")
    sizes = pool.images if method == "exact" else pool.products
    squares = sizes.square().sum(dim=1) / (1 if method == "exact" else sizes.shape[1])
    chance, (stderr, noise) = stderr, _with_noise(pool, stderr, values, squares)
    enough = method == "exact" or pool.num_probes >= min(FEWEST, goal.budget // 2)
    reached = enough and goal.rtol is not None and _norm(stderr) <= goal.rtol * _norm(values)
    missed = Status.BUDGET if goal.rtol is None else Status.MAX_MATVECS
    if goal.rtol is not None and enough and not reached and _norm(chance) <= goal.rtol * _norm(values):
        missed = Status.WITHIN_NOISE
    return DiagonalEstimate(
        value=values,
        stderr=stderr,
        num_matvecs=pool.num_matvecs,
        status=Status.CONVERGED if reached else missed,
        method=method,
        samples=D if keep_samples else None,
        dof=math.inf if method == "exact" else pool.num_probes - 1.0,
        product_noise=noise,
    )


def _with_noise(pool: ProbePool, stderr: Tensor, values: Tensor, squares: Tensor) -> tuple[Tensor, float | None]:
    """Return standard errors with the rounding error of products, and that; `squares` are those of rows of A.

    Entries of networks in bfloat16 and float16 erred by up to 0.7 times the noise of products, of their rows' norms.
    """
    if not (noise := product_noise(pool.A)):
        return stderr, None
    return torch.hypot(stderr, noise / 2 * torch.maximum(values.abs(), squares.sqrt())), noise


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _streamed(pool: ProbePool, goal: Goal) -> DiagonalEstimate:
    """Return the mean of z * (A z) over signs z and its standard error, with two vectors held beside a block.

    Variance of one probe in entry i: sum_{j != i} A_ij^2.
    """
    A, dtype, budget = pool.A, working_dtype(pool.A), goal.budget
    mean = squares = torch.zeros(0)
    spent, first, alike = 0, None, True
    if (state := pool.saved.kept()) is not None:
        mean, squares, spent, first, alike, drawn = state
        pool.generator.set_state(drawn)
    while spent < budget:
        width = min(pool.block_size, budget - spent)
        Z = pool.draw(width)
        if first is None:
            first = Z[:, :1]
            mean, squares = (torch.zeros_like(Z[:, 0], dtype=torch.float64) for _ in range(2))  # squares may vanish
        alike = alike and one_direction(torch.cat([first, Z], dim=1))
        for sample in (Z.to(dtype) * check_finite(A @ Z, spent + width).to(dtype)).T:  # Welford: no cancellation
            spent += 1
            step = sample - mean
            mean += step / spent
            squares += step * (sample - mean)
        pool.saved.keep(partial(_state, mean, squares, spent, first, alike, pool.generator))
        if pool.callback is not None:
            pool.callback(spent, f"{spent} of {budget} probes")
    stderr = (squares / (budget - 1) / budget).sqrt().to(dtype)
    of_rows = (mean.square() + squares / budget).to(dtype)
    mean = mean.to(dtype) + pool.known.diagonal
    stderr, noise = _with_noise(pool, stderr, mean, of_rows)
    return DiagonalEstimate(
        method="hutchinson",
        value=mean,
        stderr=torch.full_like(stderr, math.inf) if alike and pool.n > 1 else stderr,
        num_matvecs=budget,
        dof=budget - 1.0,
        product_noise=noise,
    )


def _state(*running: Any) -> tuple[Any, ...]:
    """Return what a streamed estimate needs to go on: what it holds, and the state of its generator, given last."""
    return *running[:-1], running[-1].get_state()


def _samples(pool: ProbePool) -> tuple[Tensor, Tensor]:
    """Return one unbiased estimate of diag A a probe, (n, k), and the sum of all covariances over all entries, ().

    Cost: 6 n k r operations, no product. The probes must be signs and A symmetric.
    """
    D = pool.probes * pool.products
    if pool.rank == 0:
        return D, D.new_zeros(())
    M = pool.basis.T @ pool.products
    S = pool.left_out(M)
    s = pool.num_sketched
    S, mu = S[:, :s], (S * M).sum(dim=0)[:s]
    q, z = pool.basis @ S, pool.images @ S
    explained = (pool.basis * pool.images).sum(dim=1, keepdim=True)
    D = explained + pool.probes * (pool.products - pool.basis @ M)
    D[:, :s] += pool.probes[:, :s] * q * mu - q * z
    return D, _covariance(pool.probes[:, :s], q, z, mu, S)


def _stderr_of_mean(D: Tensor, covariance: Tensor, num_sketched: int) -> Tensor:
    """Return the standard error of every entry of the mean of the columns of D (n, k), (n,)."""
    k = D.shape[1]
    deviations = (D - D.mean(dim=1, keepdim=True)).square().sum(dim=1)
    shared = covariance / deviations.sum().clamp_min(torch.finfo(D.dtype).tiny)
    return (deviations * (1 + shared.clamp_min(_SHARED * num_sketched / k)) / (k * (k - 1))).sqrt()


def _covariance(omega: Tensor, q: Tensor, z: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    """Return the sum of Cov(d_i, d_j) over the entries and all pairs i != j, from neighbours around a circle."""
    s = S.shape[1]
    if s < 2:
        return q.new_zeros(())
    own = (torch.linalg.vector_norm(S, dim=0) > 0).to(S)
    sums = []
    for shift in range(1, min(_NEIGHBOURS, s - 1) + 1):
        mu_j, omega_j, q_j, z_j, S_j, own_j = (X.roll(-shift, dims=-1) for X in (mu, omega, q, z, S, own))
        c = (S * S_j).sum(dim=0)
        sines = (1 - c.square()).clamp_min(torch.finfo(S.dtype).eps)
        plane = (q * z + q_j * z_j - c * (q * z_j + q_j * z)) / sines
        first = mu * omega * (q - (q - c * q_j) / sines) - q * z + plane  # d_i without j, less d_i: signs cancel
        second = mu_j * omega_j * (q_j - (q_j - c * q) / sines) - q_j * z_j + plane
        sums.append(((first * second).sum(dim=0) * own * own_j).mean())
    return torch.stack(sums).mean() * s * (s - 1)
