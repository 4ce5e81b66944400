"""The cumulative distribution of eigenvalues from stochastic Lanczos quadrature, and the distance between two.

Counts err by chance, which falls with the probes, and by the quadrature rule, which falls with the steps. The second is
bounded for every probe by the Chebyshev-Markov-Stieltjes inequalities, from the rule that has a node at the point; see
`curvature.linalg._mass_bounds`.

Reference: Golub and Meurant (2010), Matrices, Moments and Quadrature with Applications; Chen, Trogdon and Ubaru (2021),
Analysis of stochastic Lanczos quadrature for spectrum approximation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.intervals import skewness
from curvature.linalg._mass_bounds import mass_below
from curvature.linalg._validate import numbers
from curvature.results import BoundedEstimate, Estimate, SpectralDensity, mean_and_stderr

__all__ = ["cdf", "count", "quantile", "wasserstein"]


@checked
def cdf(density: SpectralDensity, points: float | Sequence[float] | Tensor) -> BoundedEstimate:
    """Estimate F(t), the share of eigenvalues at most t, for every t, of the shape of `points`."""
    t = numbers("points", points)
    of_probes = _share(density, t.reshape(-1), closed=True).reshape(-1, *t.shape)
    value, stderr = mean_and_stderr(of_probes)
    lower, upper = (x.mean(dim=0).reshape(t.shape) for x in _bounds(density, t.reshape(-1)))
    ends = {"lower": torch.minimum(lower, value), "upper": torch.maximum(upper, value)}
    dof = len(of_probes) - 1.0
    return BoundedEstimate(value=value, stderr=stderr, dof=dof, skewness=skewness(of_probes), **ends)


@checked
def count(density: SpectralDensity, low: float, high: float = torch.inf) -> BoundedEstimate:
    """Estimate how many of the n eigenvalues lie in [low, high]. Known ones, deflated, are counted exactly.

    `interval` allows for both kinds of error; from 8 probes of a matrix with one outlier, not deflated, it covers 90 %.
    Around zero, [-tolerance, tolerance], this is the dimension of the null space.

    Raises:
        InputError: unless low <= high.
    """
    if not low <= high:
        raise InputError(f"low must not exceed high, got low={low} and high={high}.")
    t = torch.tensor([low, high], dtype=torch.float64)
    below, upto = _share(density, t[:1], closed=False), _share(density, t[1:], closed=True)
    n = density.dimension
    value, stderr = mean_and_stderr((upto - below)[:, 0])
    least, most = _bounds(density, t)
    lower = torch.minimum((least[:, 1] - most[:, 0]).clamp_min(0).mean(), value)
    upper = torch.maximum((most[:, 1] - least[:, 0]).clamp_max(1).mean(), value)
    return BoundedEstimate(
        value=n * value,
        stderr=n * stderr,
        dof=len(density.weights) - 1.0,
        skewness=skewness((upto - below)[:, 0]),
        lower=n * lower,
        upper=n * upper,
    )


@checked
def quantile(density: SpectralDensity, levels: float | Sequence[float] | Tensor) -> Estimate:
    """Estimate the smallest t with F(t) >= q for every level q, of the shape of `levels`.

    The standard error is that of F(t), carried over by the inverse of F (Woodruff, 1952).

    Raises:
        InputError: for levels outside [0, 1].
    """
    q = numbers("levels", levels)
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise InputError(f"levels must be in [0, 1], got {q.tolist()}.")
    value = _inverse(density, q)
    stderr = mean_and_stderr(_share(density, value.reshape(-1), closed=True))[1].reshape(value.shape)
    spread = (_inverse(density, q + stderr) - _inverse(density, q - stderr)) / 2
    return Estimate(value=value, stderr=spread, dof=len(density.weights) - 1.0)


@checked
def wasserstein(first: SpectralDensity | Tensor, second: SpectralDensity | Tensor) -> Tensor:
    """Return the Wasserstein-1 distance between two densities, integral |F_1 - F_2| dt, (), in the units of A.

    A tensor (n,) of eigenvalues stands for their exact density. Smoothing plays no part.

    Raises:
        InputError: for tensors that are no vectors.
    """
    (x, v), (y, w) = _atoms(first), _atoms(second)
    points, order = torch.cat([x, y]).sort()
    difference = torch.cat([v, -w])[order].cumsum(0)
    return (difference[:-1].abs() * points.diff()).sum()


def _atoms(density: SpectralDensity | Tensor) -> tuple[Tensor, Tensor]:
    """Return the points of a discrete density, and their weights."""
    if isinstance(density, SpectralDensity):
        used = density.weights > 0
        return density.nodes[used], density.weights[used] / len(density.weights)
    if density.ndim != 1 or density.numel() == 0:
        raise InputError(f"eigenvalues must be a vector that is not empty, got shape {tuple(density.shape)}.")
    values = density.double().cpu()
    return values, torch.full_like(values, 1 / len(values))


def _inverse(density: SpectralDensity, levels: Tensor) -> Tensor:
    nodes, weights = _atoms(density)
    nodes, order = nodes.sort()
    total = weights[order].cumsum(0)
    places = torch.searchsorted(total, levels.clamp(0, 1) - 1e-12)  # a level that rounding just misses is reached
    return nodes[places.clamp_max(len(nodes) - 1)]


def _share(density: SpectralDensity, points: Tensor, *, closed: bool) -> Tensor:
    """Return F at the points for every probe, (num_probes, num_points): of points up to t, t included if `closed`."""
    nodes = density.nodes[..., None]
    return (density.weights[..., None] * (nodes <= points if closed else nodes < points)).sum(dim=1)


def _bounds(density: SpectralDensity, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of F just below the points, and the most of F at them, of the shape of `_share`."""
    ends = []
    for x, w, of in zip(density.nodes, density.weights, density.is_known, strict=True):
        least, most = mass_below(x, w.where(~of, 0), points, num_steps=density.num_steps)
        ends.append((least + (w * of) @ (x[:, None] < points).to(w), most + (w * of) @ (x[:, None] <= points).to(w)))
    lower, upper = (torch.stack(sides) for sides in zip(*ends, strict=True))
    return lower, upper
