"""Where the next product goes: into another probe, or into the basis that takes variance out of all probes.

With a basis from s probes a sample has the variance v(s), at most 2 |(I - Q Q') A|_F^2 for signs. The R factor of the
products known so far tells v for every s at no further product: what is left of a product y_j, j > s, outside the range
of the first s is sum_{i >= s} R_ij^2, and y_j has no part in that range, so its mean is unbiased. At s = k - 1 the mean
is over each product's distance from all others. A budget m buys the error v(s) / (m - s), and a standard error tau
costs s + v(s) / tau^2 products; either is minimised over s by looking.

The same idea with a different estimate of v: Persson, Cortinovis and Kressner (2022), Improved variants of the Hutch++
algorithm for trace estimation.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HELD_OUT = 0.75  # beyond this share of the probes too few are held out for their mean to be trusted


def residual_curve(products: Tensor) -> Tensor:
    """Return estimates of |(I - P_s) A|_F^2 for s = 0..k, (k + 1,), P_s on the range of the first s of k products."""
    k = products.shape[1]
    R = torch.linalg.qr(products, mode="r").R.double().cpu()  # min(n, k) rows
    left = R.square().flip(0).cumsum(0).flip(0)  # left[s, j]: of y_j outside the range of the first s
    counted = torch.triu(torch.ones(R.shape[0], k, dtype=R.dtype))
    means = (left * counted).sum(dim=1) / counted.sum(dim=1)
    curve = torch.zeros(k + 1, dtype=R.dtype)
    curve[: len(means)] = means
    last = max(int(_HELD_OUT * k), 1)
    if R.shape[0] == k:
        curve[last:] = torch.logspace(0, 1, k - last + 1, base=_ratio(curve[last], _mean_distance(R))) * curve[last]
    return curve.cummin(0).values


def with_left_out(curve: Tensor, num_probes: int) -> Tensor:
    """Return the mean variance of the samples of so many probes, s of which see a basis without their own product."""
    s = torch.arange(len(curve), dtype=curve.dtype)
    before = torch.cat([curve[:1], curve[:-1]])
    return curve + (s / num_probes).clamp_max(1) * (before - curve)


def most_accurate(curve: Tensor, budget: int, *, fewest: int) -> int:
    """Return the s that makes v(s) / (budget - s) least, among those that leave `fewest` samples at least."""
    s = torch.arange(len(curve), dtype=curve.dtype)
    samples = budget - s
    return int(torch.where(samples >= fewest, curve / samples, torch.inf).argmin())


def cheapest(curve: Tensor, variance: float, at: int, target: float, *, fewest: int) -> tuple[int, float]:
    """Return the s, `at` or more, and the number of samples with which a standard error of `target` costs least.

    The curve is that of `residual_curve`; its scale is set by the variance that was seen of samples with a basis from
    `at` probes, the present s. `fewest` samples are taken in any case.
    """
    known = float(curve[at])
    if known <= 0 or variance <= 0:
        return at, float(fewest)
    s = torch.arange(at, len(curve), dtype=curve.dtype)
    samples = (variance / known * curve[at:] / target**2).clamp_min(fewest)
    best = int((samples + s).argmin())
    return at + best, float(samples[best])


def _mean_distance(R: Tensor) -> float:
    """Return the mean of the squared distances of the columns of a triangular R from the span of the others."""
    diagonal = R.diagonal()
    tiny = torch.finfo(torch.float32).tiny
    R = R + torch.diag(torch.where(diagonal.abs() > tiny, 0, tiny))
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
    distances = inverse.square().sum(dim=1).reciprocal()
    return float(distances.nan_to_num(0).mean())


def _ratio(start: Tensor, end: float) -> float:
    return max(end / float(start), torch.finfo(torch.float64).tiny) if float(start) > 0 else 1.0
