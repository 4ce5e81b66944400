"""Low-rank error: how far the best approximation of each rank is from the matrix.

It follows from the spectral density with no further product: sorted by magnitude, the nodes of the quadrature say how
many eigenvalues are larger than any bound, and what all others add up to in squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from analysis.inspection.results import LowRankError
from curvature.environment.autocast import full_precision

if TYPE_CHECKING:
    from curvature.spectra.results import Spectrum

__all__ = ["low_rank_error"]

_POINTS = 60  # ranks at which the curve is known, evenly spread on a logarithmic axis


@full_precision
def low_rank_error(found: Spectrum) -> LowRankError:
    """Return |A - A_r|_F / |A|_F for A_r, the r eigenpairs of A that are largest in magnitude, and its uncertainties.

    (|A - A_r|_F / |A|_F)^2 = sum_{i > r} lambda_i^2 / sum_i lambda_i^2, and no matrix of rank r comes closer (Eckart
    and Young 1936). Eigenvalues that one node stands for are taken as equal. Cost: no product. NaN for A = 0.

    Args:
        found: from `curvature.spectrum`.
    """
    n = found.density.dimension
    ranks = torch.logspace(0, torch.log10(torch.tensor(float(n))).item(), _POINTS).round().long().clamp(1, n).unique()

    def curve(nodes: Tensor, weights: Tensor) -> Tensor:
        return _relative_error(nodes, n * weights, ranks)

    nodes, weights = found.rule.nodes, found.rule.weights
    p = len(weights)
    error = curve(nodes, weights.mean(dim=0))
    probes, rule, data = torch.zeros_like(error), torch.zeros_like(error), None
    if not found.exact:
        if p > 1:
            without = torch.stack([curve(nodes, (weights.sum(dim=0) - w) / (p - 1)) for w in weights])
            probes = ((p - 1) / p * (without - without.mean(dim=0)).square().sum(dim=0)).sqrt()
        rule = found.rule_error(error, [curve(r.nodes, r.weights.mean(dim=0)) for r in found.coarse])
    if found.spread is not None:
        data = found.spread.stderr(error, [curve(r.nodes, r.weights.mean(dim=0)) for r in found.spread.rules])
    return LowRankError(ranks=ranks, error=error, stderr=torch.hypot(probes, rule), data=data)


def _relative_error(nodes: Tensor, counts: Tensor, ranks: Tensor) -> Tensor:
    """Return the error at each rank for eigenvalues `nodes`, of which there are `counts`."""
    order = nodes.abs().argsort(descending=True)
    squares, counts = nodes[order].square(), counts[order]
    held = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    left = torch.cat([(squares * counts).flip(0).cumsum(0).flip(0), counts.new_zeros(1)])  # 0 at the end, not rounding
    place = torch.searchsorted(held, ranks.to(held)).clamp(1, len(counts))  # between held[place - 1] and held[place]
    inside = ((ranks - held[place - 1]) / counts[place - 1].clamp_min(torch.finfo(counts.dtype).tiny)).clamp(0, 1)
    energy = left[place - 1] + inside * (left[place] - left[place - 1])
    return (energy.clamp_min(0) / left[0]).sqrt()
