"""Gauss quadrature from a block Krylov space, with known eigenpairs taken out and put back exactly.

Let the rows of V span the block Krylov space of p start vectors Z, T = V A V' and V Z = B. With T = S Theta S',

    z_i'f(A) z_i ~ sum_j (S'B)_ji^2 f(theta_j),

exact for polynomials of degree 2 s - 1 after s block steps. Ritz pairs that have converged are eigenpairs: their terms
are dropped, which is what taking them out of the start vectors would do, and each comes back with weight 1/n. One space
thus serves all probes, eigenpairs and density alike.

Reference: Golub and Meurant (2010), Matrices, Moments and Quadrature with Applications, chapter 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.results.record import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Quadrature(Result):
    """Nodes that all probes share, their weights for every probe, and the eigenvalues known exactly."""

    nodes: Tensor
    """(m,), ascending; units of A."""
    weights: Tensor
    """(p, m); each row sums to 1."""
    known: Tensor
    """(q,), ascending: the nodes that are eigenvalues, of weight 1/n each."""
    num_steps: int | None
    """s: each probe's rule is exact to degree 2 s - 1. None if the nodes are all the points of its measure."""

    @property
    def is_known(self) -> Tensor:
        """(m,), bool: which nodes are eigenvalues."""
        return (self.nodes[:, None] == self.known).any(dim=1)


def quadrature(
    T: Tensor,
    B: Tensor,
    *,
    n: int,
    num_steps: int | None,
    num_low: int,
    num_high: int,
    known: Tensor | None = None,
) -> Quadrature:
    """Return the rule of every start vector from T = V A V', (m, m), and B = V Z, (m, p), for A of size n.

    `num_steps` block steps made V; None if it is invariant under A. `num_low` of the smallest and `num_high` of the
    largest Ritz pairs count as eigenpairs, whose values are `known`, ascending, or the Ritz values.
    """
    theta, S = torch.linalg.eigh(T)
    m, p = B.shape
    is_known = torch.zeros(m, dtype=torch.bool)
    is_known[:num_low] = True
    is_known[m - num_high :] = True
    if known is not None:
        theta = theta.masked_scatter(is_known, known)
    raw = (S.T @ B).square().T.masked_fill(is_known, 0)
    bulk, num_known = raw.sum(dim=1, keepdim=True), num_low + num_high
    weights = torch.where(bulk > 0, raw * ((n - num_known) / n) / bulk.clamp_min(torch.finfo(raw.dtype).tiny), 0)
    weights = weights.masked_fill(is_known, 1 / n)
    theta, order = theta.sort()
    return Quadrature(
        nodes=theta, weights=weights[:, order].expand(p, m), known=theta[is_known[order]], num_steps=num_steps
    )
