"""The trace of a matrix: one function, and the choice among the estimators of Hutchinson, Meyer, Epperly and others.

Reference: Girard (1989); Hutchinson (1990), A stochastic estimator of the trace of the influence matrix; Meyer, Musco,
Musco and Woodruff (2021), Hutch++; Epperly, Tropp and Webber (2024), XTrace (arXiv 2301.07825).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from curvature.errors import InputError
from curvature.generators import AnyGenerator
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.stochastic._hutchpp import hutchpp
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import Goal, Samples, enlarge, spend, with_noise
from curvature.linalg.stochastic._xnystrace import nystrom_samples
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import EigenPairs, TraceEstimate

TraceMethod: TypeAlias = Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"]


@numerics
def trace(
    A: AnyMatrix,
    *,
    matrix: MatrixName = "hessian",
    method: TraceMethod = "auto",
    rtol: float | None = None,
    num_matvecs: int | None = None,
    max_matvecs: int = 10_000,
    confidence: float = 0.95,
    psd: bool | None = None,
    deflate: EigenPairs | None = None,
    distribution: str | None = None,
    sketch_size: int | None = None,
    generator: AnyGenerator,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> TraceEstimate:
    """Estimate tr A to an accuracy, or as well as a budget allows, with a confidence interval.

    - "hutchinson": the mean of z'Az over probes z with E[zz'] = I, one block in memory. Variance of one probe, A
      symmetric: for signs 2 (|A|_F^2 - sum_i A_ii^2), normal 2 |A|_F^2.
    - "hutch++": exact on a subspace made of some probes, Hutchinson's estimator on the rest from others. The choice
      where the error bar must hold by theorem: a budget's estimate is unbiased by construction.
    - "xtrace": every probe serves for the subspace and, by leave-one-out, for the rest; 2 products a probe. Exact for a
      rank of k - 1 with k probes; on a flat spectrum half of the products are wasted.
    - "xnystrace": for positive semi-definite A, one product a probe. An A is refused if the probes show a negative
      eigenvalue; a small one that no combination of them sees goes unnoticed.
    - "auto" sees from the products of some probes what the variance would be with a basis of any size, and spends
      further ones on a basis or on probes, whichever brings the end nearer; the value is the mean over all probes
      ("mixed"), or, with `psd=True`, XNysTrace's where that has the smaller standard error. It may be off by up to a
      quarter of its standard error in one direction, since what the probes show decides how they are used.

    Where all this costs no less than knowing A in full, with n products, the trace is exact. The leave-one-out terms of
    "xtrace" and "xnystrace" share their products; standard errors here add the covariances, without which they are too
    small by factors of 1.2 to 3.

    With rtol the run ends when the half width of the confidence interval, Student's t over the samples, is at most rtol
    |value|, with 8 samples at least; the status says where a trace near zero, with terms of both signs, prevents it.
    The standard error allows for samples that happen to lie close together. Of nominal 95 % intervals 92 % and more
    cover (docs/benchmarks.md), of "hutchinson" with 4 products of a matrix of rank one 91 %. Where nearly all entries
    off the diagonal are zero, samples from signs take few values, and k of them agree by chance with a probability of
    up to 2^(1 - k), with an error of 0. With 4 products 76 to 85 % cover there, with 12 95 % and more;
    distribution="normal" has no such chance.

    Cost: one product a probe and one for each vector of the basis. Memory: two vectors for each of these.

    Args:
        A: square, (n, n). Its symmetry is used by "xnystrace" only, but the sizes chosen suit symmetric matrices.
        method: one of the above.
        rtol: accuracy wanted; or
        num_matvecs: products to spend, 4 at least, 2 for "hutchinson". Without either, rtol = 0.01.
        max_matvecs: most products to spend on rtol.
        confidence: level of the interval.
        psd: whether A is positive semi-definite. True lets "auto" use XNysTrace; False refuses "xnystrace"; None leaves
            it open. An A that is seen to be indefinite where it matters is refused.
        deflate: pairs that are known, from `eigsh`: their part is exact and costs no product.
        distribution: "rademacher", "normal" or "sphere". Default: "sphere" for "xtrace" and "xnystrace", else signs.
        sketch_size: of "hutch++" with a budget: vectors of the subspace, at most num_matvecs / 2 - 1. Default: chosen;
            num_matvecs // 3 is published.
        block_size: columns multiplied at a time.

    Returns:
        The estimate; `method` says what gave the value.

    Raises:
        InputError: for arguments out of range; if A is seen to be indefinite and was said not to be.

    Examples:
        >>> import torch
        >>> A = torch.diag(torch.cat([torch.tensor([100.0, 50.0]), torch.full((98,), 0.5)]))
        >>> estimate = trace(A, rtol=0.01, generator=0)
        >>> estimate.value.round(), estimate.status.ok
        (tensor(199.), True)
    """
    saved = open_run("trace", locals())
    if method not in get_args(TraceMethod):
        raise InputError(f"method must be one of {', '.join(get_args(TraceMethod))}, got {method!r}.")
    if method == "xnystrace" and psd is False:
        raise InputError('method "xnystrace" needs a positive semi-definite A, but psd=False; use "auto" or "xtrace".')
    if sketch_size is not None and method != "hutch++":
        raise InputError(f'sketch_size goes with method="hutch++", got method={method!r}.')
    if rtol is None and num_matvecs is None:
        rtol = 0.01
    least = 2 if method == "hutchinson" else 4
    goal = Goal(num_matvecs=num_matvecs, rtol=rtol, max_matvecs=max_matvecs, confidence=confidence, least=least)
    pool = ProbePool(
        as_matrix(A, matrix),
        distribution=distribution or ("sphere" if method in ("xtrace", "xnystrace") else "rademacher"),
        generator=generator,
        deflate=deflate,
        definite=method == "xnystrace" or (method == "auto" and psd is True),
        block_size=block_size,
        keep=method != "hutchinson",
        callback=callback,
        saved=saved,
    )
    if method == "hutch++":
        estimate = hutchpp(pool, goal, sketch_size)
    elif method == "auto":
        estimate = spend(pool, goal, _best if psd else _mixed)
    else:
        sample = {"hutchinson": _mixed, "xtrace": _xtrace, "xnystrace": _xnystrace}[method]
        estimate = enlarge(pool, goal, sample, price=2 if method == "xtrace" else 1)
    return with_noise(pool, goal, estimate)


def _mixed(pool: ProbePool) -> Samples:
    ends = {0: "hutchinson", pool.num_probes: "xtrace"}
    return Samples(*pool.trace_samples(), ends.get(pool.num_sketched, "mixed"))


def _xtrace(pool: ProbePool) -> Samples:
    pool.sketch(pool.num_probes)
    return Samples(*pool.trace_samples(), "xtrace")


def _xnystrace(pool: ProbePool) -> Samples:
    return Samples(*nystrom_samples(pool), "xnystrace")


def _best(pool: ProbePool) -> Samples:
    """Return the samples of the smaller standard error, where both kinds have come from one pool."""
    mixed = _mixed(pool)
    if pool.num_probes >= pool.n:
        return mixed
    nystrom = _xnystrace(pool)
    return nystrom if bool(nystrom.stderr < mixed.stderr) else mixed
