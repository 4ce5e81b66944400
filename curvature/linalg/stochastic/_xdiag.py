"""The diagonal of a symmetric matrix by XDiag: exact on a subspace, every probe used to make it and to see past it.

With the pool of `curvature.linalg.stochastic._probe_pool` and P_i on the range of all products but the i-th,

    d_i = diag(P_i A) + omega_i * (I - P_i) A omega_i

is unbiased for signs omega_i. A probe that had no part in the basis has P_i = Q Q'. As for traces the d_i are
correlated, and their spread is too small; the sum of their covariances over all entries is estimated, from estimates
that leave a neighbour out as well, and scales all standard errors alike.

Reference: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation
(arXiv 2301.07825), on XDiag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.linalg.stochastic._probe_pool import ProbePool

_NEIGHBOURS = 8  # pairs a probe, for the covariance: all of them would cost as many products of n-vectors as k^2


def diagonal_samples(pool: ProbePool) -> tuple[Tensor, Tensor]:
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


def stderr_of_mean(D: Tensor, covariance: Tensor) -> Tensor:
    """Return the standard error of every entry of the mean of the columns of D (n, k), (n,)."""
    k = D.shape[1]
    deviations = (D - D.mean(dim=1, keepdim=True)).square().sum(dim=1)
    total = deviations.sum()
    inflation = 1 + torch.where(total > 0, covariance.clamp_min(0) / total.clamp_min(torch.finfo(D.dtype).tiny), 0)
    return (deviations * inflation / (k * (k - 1))).sqrt()


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
