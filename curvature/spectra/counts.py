"""How many eigenvalues lie in an interval, and where those beyond a cut begin: bounds from one block Krylov space.

A quadrature cannot tell an eigenvalue at zero from one at a cut that is nearer to zero than its nodes are to each
other, however well its probes agree. What it leaves open are the Chebyshev-Markov-Stieltjes bounds, of each probe.
Besides, A has no fewer eigenvalues beyond a point than any compression of it (Courant-Fischer): these counts are
certain.

Reference: Karlin and Studden (1966), Tchebycheff systems; Golub and Meurant (2010), Matrices, Moments and Quadrature
with Applications.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.linalg.stochastic._mass_bounds import mass_below, next_nodes
from curvature.results.estimates import BoundedEstimate, Status, mean_and_stderr
from curvature.results.intervals import skewness
from curvature.spectra.results import Spectrum

__all__ = ["CountEstimate", "count_between", "smallest_beyond"]


_ROUNDING = 1e-6  # of a count, that sums of weights may be off by


@dataclass(frozen=True, kw_only=True, repr=False)
class CountEstimate(BoundedEstimate):
    """How many eigenvalues lie in an interval."""

    at_least: int
    """Certainly no fewer, ..."""
    at_most: int
    """... and no more."""

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the whole numbers within the bounds, widened by chance in the probes, cut to what is certain."""
        low, high = (end.clamp(self.at_least, self.at_most) for end in super().interval(confidence))
        first, last = (low - _ROUNDING * (1 + low.abs())).ceil(), (high + _ROUNDING * (1 + high.abs())).floor()
        return (first, last) if first <= last else (low, high)


def count_between(found: Spectrum, low: float = -math.inf, high: float = math.inf) -> CountEstimate:
    """Return how many eigenvalues lie in [low, high]; with all entries known, exactly, up to rounding at the ends.

    Args:
        found: the spectrum.
        low: may be infinite.
        high: no less than `low`.
    """
    n, rule, off = found.density.dimension, found.rule, found.rounding
    nodes = rule.nodes
    inner = int(((nodes >= low + off) & (nodes <= high - off)).sum())
    outer = int(((nodes >= low - off) & (nodes <= high + off)).sum())
    below, beyond = int((nodes < low - off).sum()), int((nodes > high + off).sum())
    if found.exact:
        count = float(((nodes >= low) & (nodes <= high)).sum())
        lower, upper, value, stderr = float(inner), float(outer), count, 0.0
        at_least, at_most, lopsided = inner, outer, 0.0
    else:
        whole = low == -math.inf or high == math.inf  # of a half-line a compression tells the least
        at_least, at_most = inner if whole else 0, n - below - beyond
        known = rule.is_known
        ends = torch.tensor([low - off, low + off, high - off, high + off], dtype=torch.float64)
        parts = []
        for weights in rule.weights:
            least, most = mass_below(nodes[~known], weights[~known], ends, num_steps=rule.num_steps)
            parts.append(torch.stack([(least[2] - most[1]).clamp_min(0), most[3] - least[0]]))
        certain = nodes[known]
        sure = torch.stack(
            [
                ((certain >= low + off) & (certain <= high - off)).sum(),
                ((certain >= low - off) & (certain <= high + off)).sum(),
            ]
        )
        counts = n * torch.stack(parts)
        bounds, spread = mean_and_stderr(counts)
        lopsided = max(float(skewness(counts, end).abs().max()) for end in (0, n - len(certain)))
        lower, upper = (bounds + sure).tolist()
        mean = float((n * rule.weights * ((nodes >= low) & (nodes <= high))).sum(dim=1).mean())
        value, stderr = mean, float(spread.max()) if len(parts) > 1 else math.inf
    value = min(max(value, lower, at_least), max(upper, at_least), at_most)
    tensor = torch.tensor([value, stderr, lower, upper], dtype=torch.float64)
    return CountEstimate(
        value=tensor[0],
        stderr=tensor[1],
        lower=tensor[2],
        upper=tensor[3],
        at_least=at_least,
        at_most=at_most,
        dof=found.dof,
        skewness=lopsided,
    )


def smallest_beyond(found: Spectrum, cut: float) -> tuple[float, float]:
    """Return bounds on the smallest |eigenvalue| above `cut`: at least the first, and at most the second.

    They are close where all entries are known, where the lowest eigenpair is beyond the cut, and where the space holds
    all that the probes see. Elsewhere nothing says that no eigenvalue lies just above the cut, and the first is `cut`.
    The second is infinite if no eigenvalue is seen beyond it.

    Args:
        found: the spectrum.
        cut: positive.
    """
    rule, off = found.rule, found.rounding
    lowest, residual = float(found.bottom.eigenvalues[-1]), float(found.bottom.residual_norms[-1])
    if lowest - residual > cut + off and found.bottom.status is Status.CONVERGED:
        return lowest - residual, lowest + residual
    known, nodes = rule.is_known, rule.nodes
    if found.exact:
        sizes = nodes.abs()
        sure, possible = sizes[sizes > cut + off], sizes[sizes > cut - off]
        at_most = float(sure.min()) if len(sure) else math.inf
        return max(min(float(possible.min()) if len(possible) else math.inf, at_most), cut), at_most
    sides = [side[known & (side > cut + off)] for side in (nodes, -nodes)]
    ends = [(float(side.min()), float(side.min())) for side in sides if len(side)]
    for weights in rule.weights:
        for side in (nodes, -nodes):
            ends.append(next_nodes(side[~known], weights[~known], cut + off, num_steps=rule.num_steps))
    at_most = min(most for _, most in ends)
    at_least = min(least for least, _ in ends) - off
    return max(min(at_least, at_most), cut), at_most
