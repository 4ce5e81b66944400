"""The trace of a positive semi-definite matrix by XNysTrace: Nystrom approximations that leave one probe out.

With Y = A Omega and G = Omega'Y, the Nystrom approximation Y G^-1 Y' without the i-th probe and the residual that this
probe then sees have closed forms in column i of G^-1 =: g_i:

    tr_i = tr(Y G^-1 Y') - |Y g_i|^2 / g_ii + 1 / g_ii.

Reference: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation
(arXiv 2301.07825), and the authors' code for the shift and for probes on the sphere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.linalg.base.validate import rounding_level
from curvature.linalg.stochastic._probe_pool import ProbePool
from curvature.linalg.stochastic._trace_estimate import Goal, Samples, enlarge, open_pool
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs, TraceEstimate

__all__ = ["nystrom_samples", "xnystrace"]

_SHIFTS = 6  # by what powers of ten the shift may grow until the factorisation succeeds


@full_precision
@one_matrix
@checked
def xnystrace(
    A: MatrixLike,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    max_matvecs: int = 10_000,
    confidence: float = 0.95,
    eigenpairs: EigenPairs | None = None,
    distribution: str = "sphere",
    generator: torch.Generator,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
) -> TraceEstimate:
    """Estimate the trace of a positive semi-definite A; one product a probe buys what XTrace pays two for.

    Made for Gauss-Newton and Fisher matrices. An A is refused if Omega'A Omega has a negative eigenvalue beyond
    rounding. The test is one-sided: a small negative part that no combination of the probes sees goes unnoticed, and
    then the error bar does not hold; a Hessian wants `xtrace`.

    The standard error allows for the covariances of the terms, as in `xtrace`; their spread alone, as published, is too
    small by factors of 1.5 to 3.

    Cost: one product a probe; n products where the budget allows as many, and then the trace is exact. Memory: 2 k
    vectors. A is shifted by eps |Y|_F / n^(1/2) for the factorisation, which is taken off again, so traces far below
    n eps |A|_F are lost in rounding.

    Args:
        A: symmetric positive semi-definite, (n, n).
        num_matvecs: products to spend, 4 at least; or
        rtol: double the probes until the half width of the confidence interval is at most rtol |value|.
        max_matvecs: most products to spend on rtol.
        confidence: level of that interval, by Student's t.
        eigenpairs: pairs that are known, eigenvalues the Rayleigh quotients; taken out before and added exactly.
        distribution: "sphere", "rademacher" or "normal".
        generator: source of the probes, on A's device.
        block_size: columns multiplied at a time.
        callback: called after each product with the products so far and a word on progress.

    Raises:
        InputError: if A is seen not to be positive semi-definite; unless exactly one of num_matvecs and rtol is given;
            for arguments out of range.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(0.5 ** torch.arange(100.0))
        >>> xnystrace(A, num_matvecs=20, generator=torch.Generator().manual_seed(0)).value.round(decimals=3)
        tensor(2.)
    """
    goal = Goal(num_matvecs=num_matvecs, rtol=rtol, max_matvecs=max_matvecs, confidence=confidence)
    pool, known = open_pool(
        A,
        distribution=distribution,
        generator=generator,
        eigenpairs=eigenpairs,
        definite=True,
        block_size=block_size,
        callback=callback,
    )
    return enlarge(pool, known, goal, lambda p: Samples(*nystrom_samples(p), "xnystrace"), price=1)


def nystrom_samples(pool: ProbePool) -> tuple[Tensor, Tensor]:
    """Return the leave-one-out estimates of the trace, (k,), and the sum of the covariances of all pairs, ().

    Raises:
        InputError: if the products show that A is not positive semi-definite.
    """
    Omega, Y = pool.probes, pool.products
    n, k = Y.shape
    eps = max(torch.finfo(Y.dtype).eps, rounding_level(pool.A) / 10)
    size = torch.linalg.matrix_norm(Y)
    if not bool(size > 0):
        return Y.new_zeros(k), Y.new_zeros(())
    G = Omega.T @ Y
    _check_definite(G, Omega, size, eps)
    G = (G + G.T) / 2
    gram = Omega.T @ Omega
    for power in range(_SHIFTS):
        shift = 10.0**power * eps * size / n**0.5
        L, failed = torch.linalg.cholesky_ex(G + shift * gram)
        if not bool(failed):
            break
    else:
        raise InputError(f"A must be positive semi-definite, but Omega'A Omega is not; {_ADVICE}")
    inverse = torch.linalg.solve_triangular(L, torch.eye(k, dtype=Y.dtype, device=Y.device), upper=False)
    G_inverse = inverse.T @ inverse
    B = (Y + shift * Omega) @ inverse.T  # Y G^-1 Y' = B B'
    D = B @ inverse
    K = D.T @ D
    whole = B.square().sum() - shift * n
    g, kappa = G_inverse.diagonal(), K.diagonal()
    room = _room(Omega) if pool.distribution == "sphere" else None
    rest = 1 / g if room is None else (n - k + 1) * room.diagonal() / g
    alone = whole - kappa / g + rest

    i = slice(None), None  # the probe, against j, the other one that is left out
    determinant = _determinants(G_inverse)
    rest = g / determinant
    if room is not None:
        rest = rest * (n - k + 2) * _determinants(room) / room.diagonal()
    both = whole - (g * kappa[i] + g[i] * kappa - 2 * G_inverse * K) / determinant + rest
    changes = (alone[i] - both) * (1 - torch.eye(k, dtype=Y.dtype, device=Y.device))
    return alone, (changes * changes.T).sum()


_ADVICE = 'use xtrace, or method="auto" without psd=True, for matrices with negative eigenvalues, such as Hessians.'


def _check_definite(G: Tensor, Omega: Tensor, size: Tensor, eps: float) -> None:
    """Refuse a G = Omega'A Omega that is not symmetric or has a negative eigenvalue beyond the rounding of products."""
    rounding = 10 * eps * size * torch.linalg.matrix_norm(Omega)
    lowest = torch.linalg.eigvalsh((G + G.T) / 2)[0]
    if not bool(lowest >= -rounding):
        seen = float((lowest / Omega.shape[0]).detach())
        raise InputError(f"A must be positive semi-definite, but has Rayleigh quotients near {seen:.3g}; {_ADVICE}")
    if not bool(torch.linalg.matrix_norm(G - G.T) <= 10 * rounding):
        raise InputError("A must be symmetric, but u'Av and v'Au differ beyond rounding; use hutchinson_trace.")


def _determinants(G: Tensor) -> Tensor:
    """Return g_ii g_jj - g_ij^2 for every pair, (k, k)."""
    g = G.diagonal()
    return (g[:, None] * g - G.square()).clamp_min(torch.finfo(G.dtype).eps * g[:, None] * g)


def _room(Omega: Tensor) -> Tensor:
    """Return (Omega'Omega)^-1: one over its i-th diagonal entry is what of omega_i is outside of the other probes."""
    R = torch.linalg.qr(Omega, mode="r").R
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return inverse @ inverse.T
