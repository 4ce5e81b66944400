"""The trace of a matrix: Hutchinson's estimator, tr A = E[z'Az] for random z with E[zz'] = I, and the choice of others.

Reference: Girard (1989); Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.linalg.base.validate import check_count, check_finite, check_generator, check_square, working_dtype
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import Goal, Samples, enlarge, open_pool, spend
from curvature.linalg.stochastic.hutchpp import hutchpp
from curvature.linalg.stochastic.probes import draw, one_direction
from curvature.linalg.stochastic.xnystrace import nystrom_samples, xnystrace
from curvature.linalg.stochastic.xtrace import xtrace
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs, Status, TraceEstimate, mean_and_stderr

__all__ = ["TRACE_METHODS", "hutchinson_trace", "trace"]

TRACE_METHODS = ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace")

_FEWEST = 8  # probes before a standard error is believed


@full_precision
@one_matrix
@checked
def trace(
    A: MatrixLike,
    *,
    method: str = "auto",
    rtol: float | None = None,
    num_matvecs: int | None = None,
    max_matvecs: int = 10_000,
    confidence: float = 0.95,
    psd: bool | None = None,
    eigenpairs: EigenPairs | None = None,
    distribution: str | None = None,
    generator: torch.Generator,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> TraceEstimate:
    """Estimate tr A to an accuracy, or as well as a budget allows, with a confidence interval.

    `method="auto"` draws some probes and multiplies them. These products are samples of Hutchinson's estimator, and
    their range is where most of A is; how much of each lies outside the range of the others says what the variance
    would be with a basis of any size s. Products then go to a basis or to further probes, whichever brings the end
    nearer. The value is the mean over all probes, those that made the basis by leave-one-out ("mixed"; "hutchinson" and
    "xtrace" are its two ends). With `psd=True` the same products give an estimate by XNysTrace as well, and that of the
    smaller standard error is taken. Where all this costs no less than knowing A in full, with n products, the
    trace is exact. No product is computed twice.

    The run ends when the half width of the confidence interval, Student's t over the samples, is at most rtol |value|,
    with 8 samples at least. For a trace near zero with terms of both signs no estimator reaches a relative accuracy;
    the status says so. Stopping at an accuracy favours samples that happen to lie close together, for which the
    standard error allows. Of nominal 95 % intervals 92 to 99 % cover, with the exceptions named in docs/benchmarks.md.
    "auto" may be off by up to a quarter of its standard error in one direction, since what the probes show decides how
    they are used; "hutch++" with a budget is unbiased by construction.

    Cost: one product a probe and one for each vector of the basis. Memory: two vectors for each of these.

    Args:
        A: square, (n, n). Its symmetry is used by "xnystrace" only, but the sizes chosen suit symmetric matrices.
        method: "auto", "hutchinson", "hutch++", "xtrace" or "xnystrace"; see the functions of these names.
        rtol: accuracy wanted; or
        num_matvecs: products to spend, 4 at least. Without either, rtol = 0.01.
        max_matvecs: most products to spend on rtol.
        confidence: level of the interval.
        psd: whether A is positive semi-definite. True lets "auto" use XNysTrace; False refuses "xnystrace"; None leaves
            it open. An A that is seen to be indefinite where it matters is refused.
        eigenpairs: pairs that are known, from `eigsh`: their part is exact and costs no product.
        distribution: "rademacher", "normal" or "sphere". Default: that of the method's own function.
        generator: source of the probes, on A's device.
        block_size: columns multiplied at a time.
        callback: called after each product with the products so far and a word on progress.

    Returns:
        The estimate; `method` says what gave the value.

    Raises:
        InputError: for arguments out of range; if A is seen to be indefinite and was said not to be.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(torch.cat([torch.tensor([100.0, 50.0]), torch.full((98,), 0.5)]))
        >>> estimate = trace(A, rtol=0.01, generator=torch.Generator().manual_seed(0))
        >>> estimate.value.round(), estimate.status.ok
        (tensor(199.), True)
    """
    if method not in TRACE_METHODS:
        raise InputError(f"method must be one of {', '.join(TRACE_METHODS)}, got {method!r}.")
    if method == "xnystrace" and psd is False:
        raise InputError('method "xnystrace" needs a positive semi-definite A, but psd=False; use "auto" or "xtrace".')
    if rtol is None and num_matvecs is None:
        rtol = 0.01
    common = {"confidence": confidence, "generator": generator, "block_size": block_size, "callback": callback}
    common |= {"num_matvecs": num_matvecs, "rtol": rtol, "max_matvecs": max_matvecs, "eigenpairs": eigenpairs}
    if method in _FUNCTIONS:
        own = {} if distribution is None else {"distribution": distribution}
        return _FUNCTIONS[method](A, **common, **own)
    goal = Goal(num_matvecs=num_matvecs, rtol=rtol, max_matvecs=max_matvecs, confidence=confidence)
    pool, known = open_pool(
        A,
        distribution=distribution or "rademacher",
        generator=generator,
        eigenpairs=eigenpairs,
        definite=psd is True,
        block_size=block_size,
        callback=callback,
    )
    if method == "hutchinson":
        return enlarge(pool, known, goal, _mixed, price=1)
    return spend(pool, known, goal, _best if psd else _mixed)


_FUNCTIONS: dict[str, Callable[..., TraceEstimate]] = {"hutch++": hutchpp, "xtrace": xtrace, "xnystrace": xnystrace}


def _mixed(pool: ProbePool) -> Samples:
    ends = {0: "hutchinson", pool.num_probes: "xtrace"}
    return Samples(*pool.trace_samples(), ends.get(pool.num_sketched, "mixed"))


def _best(pool: ProbePool) -> Samples:
    """Return the samples of the smaller standard error, where both kinds have come from one pool."""
    mixed = _mixed(pool)
    if pool.num_probes >= pool.n:
        return mixed
    nystrom = Samples(*nystrom_samples(pool), "xnystrace")
    return nystrom if bool(nystrom.stderr < mixed.stderr) else mixed


@full_precision
@one_matrix
@checked
def hutchinson_trace(
    A: MatrixLike,
    *,
    num_probes: int | None = None,
    rtol: float | None = None,
    max_probes: int = 10_000,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
    probes: Tensor | None = None,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> TraceEstimate:
    """Estimate tr A as the mean of z'Az over probes z, with its standard error.

    Variance of one probe, A symmetric: Rademacher 2 (|A|_F^2 - sum_i A_ii^2), so a diagonal A is exact; normal 2
    |A|_F^2. Cost: one product a probe. For spectra that decay fast Hutch++ and XTrace need far fewer.

    Args:
        A: square, (n, n); symmetry is not needed.
        num_probes: how many probes to spend, at least 2; or
        rtol: go on until stderr <= rtol |value|, after 8 probes at least.
        max_probes: most probes to spend on rtol.
        distribution: "rademacher", "normal" or "sphere".
        generator: source of the probes, on A's device; not needed with `probes`.
        probes: (n, k) independent columns to use instead of drawing them.
        block_size: probes multiplied at a time.
        callback: called after each product with the products so far and a word on progress.

    Raises:
        InputError: unless exactly one of num_probes, rtol and probes is given; for counts out of range.
        NonFiniteError: if a product is not finite.
    """
    n = check_square(A)
    if sum(x is not None for x in (num_probes, rtol, probes)) != 1:
        raise InputError("give exactly one of num_probes (a budget), rtol (an accuracy) and probes (the vectors).")
    check_count("block_size", block_size, 1)
    if probes is not None:
        if probes.ndim != 2 or probes.shape[0] != n:
            raise InputError(f"probes must have shape ({n}, k), got {tuple(probes.shape)}.")
        num_probes = probes.shape[1]
    elif generator is None:
        raise InputError("generator is needed to draw probes, e.g. torch.Generator().manual_seed(0).")
    else:
        check_generator(A, generator)
    if rtol is not None and not rtol > 0:
        raise InputError(f"rtol must be positive, got {rtol}.")
    budget = max_probes if num_probes is None else num_probes
    check_count("max_probes" if num_probes is None else "num_probes", budget, 2)
    samples: list[Tensor] = []
    spent, status = 0, Status.BUDGET if rtol is None else Status.MAX_PROBES
    first, alike = None, True
    while spent < budget:
        width = min(block_size, budget - spent)
        if probes is not None:
            Z = probes[:, spent : spent + width].to(A.dtype)
        else:
            assert generator is not None
            Z = draw(distribution, n, width, generator=generator, dtype=A.dtype, device=A.device)
        AZ = check_finite(A @ Z, spent + width)
        spent += width
        first = Z[:, :1] if first is None else first
        alike = alike and one_direction(torch.cat([first, Z], dim=1))
        dtype = working_dtype(A)
        samples.append((Z.to(dtype) * AZ.to(dtype)).sum(dim=0))
        value, stderr = (number.to(dtype) for number in mean_and_stderr(torch.cat(samples).double()))
        stderr = torch.full_like(stderr, torch.inf) if alike and n > 1 else stderr
        if callback is not None:
            callback(spent, f"{float(value):.4g} +- {float(stderr):.1g}")
        if rtol is not None and spent >= min(_FEWEST, budget) and bool(stderr <= rtol * value.abs()):
            status = Status.CONVERGED
            break
    return TraceEstimate(value=value, stderr=stderr, num_matvecs=spent, samples=torch.cat(samples), status=status)
