"""The cumulative distribution of eigenvalues from stochastic Lanczos quadrature, and the distance between two.

Counts err by chance, which falls with the probes, and by the quadrature rule, which falls with the steps. The second is
bounded for every probe by the Chebyshev-Markov-Stieltjes inequalities, from the rule that has a node at the point; see
`curvature.linalg.stochastic._mass_bounds`.

Reference: Golub and Meurant (2010), Matrices, Moments and Quadrature with Applications; Chen, Trogdon and Ubaru (2021),
Analysis of stochastic Lanczos quadrature for spectrum approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linalg.base.validate import numbers
from curvature.linalg.stochastic._mass_bounds import mass_below
from curvature.results.estimates import BoundedEstimate, SpectralDensity, bounded_mean

_INNER = 48  # nodes at which quantiles are sought first
_PARTS, _ROUNDS = 8, 6  # into which the cell between two of them is cut, and how often
_ROUNDING = 1e-12  # of F


@checked
def cdf(density: SpectralDensity, points: float | Sequence[float] | Tensor) -> BoundedEstimate:
    """Estimate F(t), the share of eigenvalues at most t, for every t, of the shape of `points`."""
    t = numbers("points", points)
    flat = t.reshape(-1)
    samples, lower, upper = (
        x.reshape(-1, *t.shape) for x in (_share(density, flat, closed=True), *_bounds(density, flat))
    )
    known = (density.deflated <= t[..., None]).sum(dim=-1) / density.dimension
    return bounded_mean(samples, lower, upper, (known, 1 - len(density.deflated) / density.dimension + known))


@checked
def count(density: SpectralDensity, low: float, high: float = torch.inf) -> BoundedEstimate:
    """Estimate how many of the n eigenvalues lie in [low, high]. Known ones, deflated, are counted exactly.

    `interval` allows for both kinds of error; of nominal 95 % 94 % and more cover (docs/benchmarks.md).
    Around zero, [-tolerance, tolerance], this is the dimension of the null space.

    Raises:
        InputError: unless low <= high.
    """
    if not low <= high:
        raise InputError(f"low must not exceed high, got low={low} and high={high}.")
    t = torch.tensor([low, high], dtype=torch.float64)
    below, upto = _share(density, t[:1], closed=False), _share(density, t[1:], closed=True)
    least, most = _bounds(density, t)
    lower, upper = (least[:, 1] - most[:, 0]).clamp_min(0), (most[:, 1] - least[:, 0]).clamp_max(1)
    n, known = density.dimension, density.deflated
    sure = ((known >= low) & (known <= high)).sum()
    return bounded_mean(n * (upto - below)[:, 0], n * lower, n * upper, (sure, n - len(known) + sure))


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantileEstimate(BoundedEstimate):
    """Points where F reaches given levels, units of A. `stderr` is that of F, carried over by its inverse."""

    levels: Tensor
    """Of the same shape: q, in [0, 1]."""
    density: SpectralDensity
    """Of which they are quantiles."""

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the first and the last t whose interval of F(t), by `cdf`, holds q; infinite where none bounds it."""
        return _ends(self.density, self.levels, self.value, confidence)


@checked
def quantile(density: SpectralDensity, levels: float | Sequence[float] | Tensor) -> QuantileEstimate:
    """Estimate the smallest t with F(t) >= q for every level q, of the shape of `levels`.

    Bounds and `interval` invert those of `cdf`, for both kinds of error (Woodruff, 1952). They are infinite where the
    quadrature bounds nothing: below for q = 0, above for q = 1, unless `num_steps` is None and the nodes are all there
    is. For few steps and levels near those they are far out. Cost: some hundred points of `cdf`, and as many for each
    interval.

    Raises:
        InputError: for levels outside [0, 1].
    """
    q = numbers("levels", levels)
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise InputError(f"levels must be in [0, 1], got {q.tolist()}.")
    value = _inverse(density, q)
    stderr = cdf(density, value).stderr
    spread = (_inverse(density, q + stderr) - _inverse(density, q - stderr)) / 2
    lower, upper = _ends(density, q, value, None)
    dof = len(density.weights) - 1.0
    return QuantileEstimate(value=value, stderr=spread, dof=dof, lower=lower, upper=upper, levels=q, density=density)


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


def _ends(density: SpectralDensity, levels: Tensor, value: Tensor, confidence: float | None) -> tuple[Tensor, Tensor]:
    """Return the ends of {t: lower(t) <= q <= upper(t)} for every level, outwards of the values.

    `lower` and `upper` are the bounds of F at t, widened by chance if there is a confidence. They are taken on a grid,
    dense where nodes are and reaching out by powers of two; then the cells that hold the ends are cut.
    """
    q = levels.reshape(-1)

    def bounds(points: Tensor) -> tuple[Tensor, Tensor]:
        F = cdf(density, points)
        low, high = (F.lower, F.upper) if confidence is None else F.interval(confidence)
        return low - _ROUNDING, high + _ROUNDING

    nodes = _atoms(density)[0].unique()
    first, last = nodes[0], nodes[-1]
    reach = torch.maximum(last - first, 1e-3 * nodes.abs().max()).clamp_min(1e-300) * 2.0 ** torch.arange(-40, 32, 4)
    inner = nodes[torch.linspace(0, len(nodes) - 1, min(len(nodes), _INNER)).round().long()]
    edge = torch.tensor([torch.inf], dtype=nodes.dtype)
    grid = torch.cat([-edge, first - reach.flip(0), inner, last + reach, edge])
    low, high = bounds(grid)
    begin = (high >= q[:, None]).to(torch.uint8).argmax(dim=1)  # the first that may be reached; at infinity F is 1
    end = len(grid) - 1 - (low.flip(0) <= q[:, None]).to(torch.uint8).argmax(dim=1)
    outer = torch.stack([grid[(begin - 1).clamp_min(0)], grid[(end + 1).clamp_max(len(grid) - 1)]])
    inside = torch.stack([grid[begin], grid[end]])
    share = torch.arange(1, _PARTS, dtype=nodes.dtype)[:, None, None] / _PARTS
    for _ in range(_ROUNDS):
        points = torch.where(outer.isfinite(), outer + share * (inside - outer), outer)
        low, high = bounds(points)
        holds = torch.stack([high[:, 0] >= q, low[:, 1] <= q], dim=1)
        count_out = (~holds).sum(dim=0, keepdim=True)  # these come first
        ladder = torch.cat([outer[None], points, inside[None]])
        outer, inside = ladder.gather(0, count_out)[0], ladder.gather(0, count_out + 1)[0]
    if density.num_steps is None:  # the nodes are all there is
        outer = outer.clamp(first, last)
    lower, upper = (x.reshape(levels.shape) for x in outer)
    return torch.minimum(lower, value), torch.maximum(upper, value)


def _share(density: SpectralDensity, points: Tensor, *, closed: bool) -> Tensor:
    """Return F at the points for every probe, (num_probes, num_points): of points up to t, t included if `closed`."""
    nodes = density.nodes[..., None]
    return (density.weights[..., None] * (nodes <= points if closed else nodes < points)).sum(dim=1)


def _bounds(density: SpectralDensity, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of F just below the points, and the most of F at them, of the shape of `_share`."""
    ends = []
    off = 2 * (density.product_noise or 0.0) * float(density.nodes.abs().max())  # of an eigenvalue, at most
    for x, w, of in zip(density.nodes, density.weights, density.is_known, strict=True):
        known, before, after = w.where(~of, 0), points - off, points + off
        least, most = mass_below(x, known, before, num_steps=density.num_steps)
        most = mass_below(x, known, after, num_steps=density.num_steps)[1] if off else most
        ends.append((least + (w * of) @ (x[:, None] < before).to(w), most + (w * of) @ (x[:, None] <= after).to(w)))
    lower, upper = (torch.stack(sides) for sides in zip(*ends, strict=True))
    return lower, upper
