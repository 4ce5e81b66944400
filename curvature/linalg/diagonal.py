"""The diagonal of a matrix by Hutchinson's estimator: diag A = E[z * Az] for random signs z.

Reference: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg._validate import check_count, check_finite, check_generator, check_square, working_dtype
from curvature.linalg.probes import rademacher
from curvature.linop import MatrixLike
from curvature.results import DiagonalEstimate

__all__ = ["hutchinson_diagonal"]


def hutchinson_diagonal(
    A: MatrixLike,
    *,
    num_probes: int | None = None,
    generator: torch.Generator | None = None,
    probes: Tensor | None = None,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> DiagonalEstimate:
    """Estimate diag A as the mean of z * (A z) over random signs z, with a standard error for every entry.

    Variance of one probe in entry i: sum_{j != i} A_ij^2. The entries of small magnitude in rows of large ones are the
    expensive ones; the standard errors show which. Cost: one product a probe; memory: two vectors beside a block.

    Args:
        A: square, (n, n).
        num_probes: how many probes to spend, at least 2.
        generator: source of the probes, on A's device; not needed with `probes`.
        probes: (n, k) independent columns of +-1 to use instead of drawing them.
        block_size: probes multiplied at a time.
        callback: called after each product with the products so far and a word on progress.

    Raises:
        InputError: unless exactly one of num_probes and probes is given; for counts out of range.
        NonFiniteError: if a product is not finite.
    """
    n = check_square(A)
    if (num_probes is None) == (probes is None):
        raise InputError("give exactly one of num_probes (a budget) and probes (the vectors).")
    check_count("block_size", block_size, 1)
    if probes is not None:
        if probes.ndim != 2 or probes.shape[0] != n or not bool((probes.abs() == 1).all()):
            raise InputError(f"probes must be signs, +-1, of shape ({n}, k), got shape {tuple(probes.shape)}.")
        num_probes = probes.shape[1]
    elif generator is None:
        raise InputError("generator is needed to draw probes, e.g. torch.Generator().manual_seed(0).")
    else:
        check_generator(A, generator)
    assert num_probes is not None
    check_count("num_probes", num_probes, 2)
    dtype = working_dtype(A)
    mean, squares = (torch.zeros(n, dtype=dtype, device=A.device) for _ in range(2))
    spent = 0
    while spent < num_probes:
        width = min(block_size, num_probes - spent)
        if probes is not None:
            Z = probes[:, spent : spent + width].to(A.dtype)
        else:
            assert generator is not None
            Z = rademacher(n, width, generator=generator, dtype=A.dtype, device=A.device)
        samples = Z.to(dtype) * check_finite(A @ Z, spent + width).to(dtype)
        for sample in samples.T:  # Welford's recurrence: no cancellation
            spent += 1
            step = sample - mean
            mean += step / spent
            squares += step * (sample - mean)
        if callback is not None:
            callback(spent, f"{spent} of {num_probes} probes")
    stderr = (squares / (num_probes - 1) / num_probes).sqrt()
    return DiagonalEstimate(values=mean, stderr=stderr, num_matvecs=num_probes)
