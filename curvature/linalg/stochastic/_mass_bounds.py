"""How much of a measure lies below a point: the bounds of Chebyshev, Markov and Stieltjes, from its quadrature rule.

The measure of a probe z is that of |E(t) z|^2, E the spectral projectors of A. A rule of m nodes that is exact to
degree 2 m - 2 and has a node at c brackets every measure F of the same moments,

    sum_{theta_i < c} w_i <= F(c -),    F(c) <= sum_{theta_i <= c} w_i,

and nothing sharper follows from these moments. F has a point between any two neighbouring nodes, or at them. Rules of
block Krylov spaces have more nodes than their degree warrants: the Lanczos process on a rule, as a measure of its own,
gives the rule of each probe.

Reference: Karlin and Studden (1966), Tchebycheff systems, chapter 4; Golub and Meurant (2010), Matrices, Moments and
Quadrature with Applications, on rules with prescribed nodes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BREAKDOWN = 1e-13  # of the largest |node|: a coupling below it ends the process, and the measure has no more points
_FAR = 1e8  # largest |nodes|: where the prescribed node meets another one, one node goes to infinity
_DUST = 1e-13  # of the mass: a weight below it may be rounding
Array = NDArray[np.float64]


def mass_below(nodes: Tensor, weights: Tensor, points: Tensor, *, num_steps: int | None) -> tuple[Tensor, Tensor]:
    """Return the least of F(c -) and the most of F(c) for every point c, (P,) each, infinite ones allowed.

    Nodes and weights (m,) are those of one probe's rule, exact to degree 2 num_steps - 1; None if its nodes are all the
    points of the measure.
    """
    x, w, c = nodes.numpy(), weights.numpy(), points.numpy()
    finite = np.isfinite(c)
    lower = np.where(c > 0, w.sum(), 0.0)
    upper = lower.copy()
    if finite.any() and w.sum() > 0:
        theta, v, reach, _ = _rules(x, w, c[finite], num_steps)
        lower[finite] = np.where(theta < c[finite, None] - reach, v, 0).sum(axis=1)
        upper[finite] = np.where(theta <= c[finite, None] + reach, v, 0).sum(axis=1)
    return torch.from_numpy(lower), torch.from_numpy(upper)


def next_nodes(nodes: Tensor, weights: Tensor, point: float, *, num_steps: int | None) -> tuple[float, float]:
    """Return bounds on the smallest point of the measure above `point`: where it may be at least, and is at most.

    The second is infinite if nothing shows a point there. They differ where the rule does not hold all points.
    """
    w = weights.numpy()
    if not w.sum() > 0:
        return point, torch.inf
    theta, v, reach, exact = _rules(nodes.numpy(), w, np.array([point]), num_steps)
    above = theta[(theta > point + reach) & (v > _DUST * w.sum())]
    first = float(above.min()) if len(above) else torch.inf
    return first if exact else point, first


def shortened(nodes: Tensor, weights: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the Gauss rule of fewer nodes, from the first moments of a rule of one probe."""
    used = weights.numpy() > 0
    x, w = nodes.numpy()[used], weights.numpy()[used]
    alpha, beta = _jacobi(x, w, num_steps)
    theta, S = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    return torch.from_numpy(theta), torch.from_numpy(w.sum() * S[0] ** 2)


def with_node(nodes: Tensor, weights: Tensor, point: float, *, num_steps: int | None) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Radau rule of s nodes, one of them at `point`; that given if it holds all points already."""
    if not weights.sum() > 0:
        return nodes, weights
    theta, v, reach, exact = _rules(nodes.numpy(), weights.numpy(), np.array([point]), num_steps)
    placed = theta if exact else np.where(np.abs(theta - point) <= reach, point, theta)
    return torch.from_numpy(placed[0]), torch.from_numpy(v[0])


def _rules(nodes: Array, weights: Array, points: Array, num_steps: int | None) -> tuple[Array, Array, Array, bool]:
    """Return for every point a rule (P, s) with a node there, and how far from the point that may have come out (P, 1).

    If the rule given is the measure itself it is returned as it is, with True.
    """
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    alpha = beta = np.zeros(0)
    if num_steps is not None:
        alpha, beta = _jacobi(nodes, weights, num_steps)
    if num_steps is None or len(alpha) < num_steps:
        return nodes[None], weights[None], np.zeros((1, 1)), True
    s = len(alpha)
    matrices = np.tile(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1), (len(points), 1, 1))
    scale = max(np.abs(nodes).max(), np.abs(points).max(), np.finfo(np.float64).tiny)
    last = points.copy()
    if s > 1:
        inner, U = np.linalg.eigh(matrices[0, :-1, :-1])
        gaps = inner - points[:, None]
        gaps = np.where(np.abs(gaps) < scale / _FAR**2, np.copysign(scale / _FAR**2, gaps), gaps)
        last = points + beta[-1] ** 2 * (U[-1] ** 2 / gaps).sum(axis=1)
    matrices[:, -1, -1] = last.clip(-_FAR * scale, _FAR * scale)
    theta, S = np.linalg.eigh(matrices)
    size = np.maximum(np.abs(matrices[:, -1, -1:]), scale)
    missed = np.abs(theta - points[:, None]).min(axis=1, keepdims=True)
    reach = np.maximum(8 * np.finfo(np.float64).eps * size, 1.01 * missed)
    return theta, weights.sum() * S[:, 0] ** 2, reach, False


def _jacobi(nodes: Array, weights: Array, steps: int) -> tuple[Array, Array]:
    """Return diagonal and off-diagonal of the Jacobi matrix of a discrete measure: `steps` rows, or all there are."""
    Q = np.zeros((steps, len(nodes)))
    q = np.sqrt(weights / weights.sum())
    alpha: list[float] = []
    beta: list[float] = []
    floor = _BREAKDOWN * np.abs(nodes).max()
    for k in range(steps):
        Q[k] = q
        r = nodes * q
        alpha.append(q @ r)
        for _ in range(2):  # twice is enough
            r -= Q[: k + 1].T @ (Q[: k + 1] @ r)
        norm = float(np.linalg.norm(r))
        if not norm > floor:
            break
        beta.append(norm)
        q = r / norm
    return np.array(alpha), np.array(beta[: len(alpha) - 1])
