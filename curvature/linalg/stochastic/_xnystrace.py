"""The trace of a positive semi-definite matrix by XNysTrace: Nystrom approximations that leave one probe out.

With Y = A Omega and G = Omega'Y, the Nystrom approximation Y G^-1 Y' without the i-th probe and the residual that this
probe then sees have closed forms in column i of G^-1 =: g_i:

    tr_i = tr(Y G^-1 Y') - |Y g_i|^2 / g_ii + 1 / g_ii.

A is shifted by eps |Y|_F / n^(1/2) for the factorisation, which is taken off again, so traces far below n eps |A|_F are
lost in rounding.

Reference: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation
(arXiv 2301.07825), and the authors' code for the shift and for probes on the sphere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.validate import rounding_level
from curvature.linalg.stochastic._probe_pool import ProbePool

_SHIFTS = 6  # by what powers of ten the shift may grow until the factorisation succeeds


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


_ADVICE = 'take method="xtrace", or "auto" without psd=True, for matrices with negative eigenvalues, such as Hessians.'


def _check_definite(G: Tensor, Omega: Tensor, size: Tensor, eps: float) -> None:
    """Refuse a G = Omega'A Omega that is not symmetric or has a negative eigenvalue beyond the rounding of products."""
    rounding = 10 * eps * size * torch.linalg.matrix_norm(Omega)
    lowest = torch.linalg.eigvalsh((G + G.T) / 2)[0]
    if not bool(lowest >= -rounding):
        seen = float((lowest / Omega.shape[0]).detach())
        raise InputError(f"A must be positive semi-definite, but has Rayleigh quotients near {seen:.3g}; {_ADVICE}")
    if not bool(torch.linalg.matrix_norm(G - G.T) <= 10 * rounding):
        raise InputError("A must be symmetric, but u'Av and v'Au differ beyond rounding; take method='hutchinson'.")


def _determinants(G: Tensor) -> Tensor:
    """Return g_ii g_jj - g_ij^2 for every pair, (k, k)."""
    g = G.diagonal()
    return (g[:, None] * g - G.square()).clamp_min(torch.finfo(G.dtype).eps * g[:, None] * g)


def _room(Omega: Tensor) -> Tensor:
    """Return (Omega'Omega)^-1: one over its i-th diagonal entry is what of omega_i is outside of the other probes."""
    R = torch.linalg.qr(Omega, mode="r").R
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return inverse @ inverse.T
