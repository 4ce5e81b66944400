"""The trace of a matrix by Hutchinson's estimator: tr A = E[z'Az] for random z with E[zz'] = I.

Reference: Girard (1989); Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg._validate import check_count, check_finite, check_generator, check_square, working_dtype
from curvature.linalg.probes import draw
from curvature.linop import MatrixLike
from curvature.results import Status, TraceEstimate, mean_and_stderr

__all__ = ["hutchinson_trace"]

_FEWEST = 8  # probes before a standard error is believed


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
    while spent < budget:
        width = min(block_size, budget - spent)
        if probes is not None:
            Z = probes[:, spent : spent + width].to(A.dtype)
        else:
            assert generator is not None
            Z = draw(distribution, n, width, generator=generator, dtype=A.dtype, device=A.device)
        AZ = check_finite(A @ Z, spent + width)
        spent += width
        dtype = working_dtype(A)
        samples.append((Z.to(dtype) * AZ.to(dtype)).sum(dim=0))
        value, stderr = mean_and_stderr(torch.cat(samples))
        if callback is not None:
            callback(spent, f"{float(value):.4g} +- {float(stderr):.1g}")
        if rtol is not None and spent >= min(_FEWEST, budget) and bool(stderr <= rtol * value.abs()):
            status = Status.CONVERGED
            break
    return TraceEstimate(value=value, stderr=stderr, num_matvecs=spent, samples=torch.cat(samples), status=status)
