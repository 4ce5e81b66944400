"""What exact quantities are returned as: diagonals, and diagonal blocks beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.results.record import Result

__all__ = ["ExactDiagonal"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ExactDiagonal(Result):
    """The diagonal of a curvature matrix of an objective."""

    _large = ("value", "stderr")

    value: Tensor
    """(n,), units of the loss per squared unit of the parameter."""
    stderr: Tensor
    """(n,), standard error over the Monte Carlo samples; zeros where the diagonal is exact and in float64, infinite for
    one sample. It holds half of `product_noise`, of each entry or of the root of their mean square."""
    kind: str
    """Which matrix: "ggn", "hessian", or a Monte Carlo estimate of the Gauss-Newton diagonal."""
    route: str
    """What did the work: "rules" of layers, "vmap" or "loop" over examples, "columns", "products", or several."""
    reason: str
    """Why not rules for all parameters, and what was checked."""
    num_columns: int
    """Columns pulled back, or products, summed over batches: about a gradient of a batch each."""
    num_samples: int
    """Monte Carlo samples; 0 where the diagonal is exact."""
    seconds: float
    """Wall-clock time, with checks."""
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the parameters, in the order of `value`."""
    product_noise: float | None = None
    """Relative rounding error of products; None in float64."""

    def by_parameter(self) -> dict[str, Tensor]:
        """Return views of `value` in the parameters' shapes, by name."""
        sizes = [torch.Size(shape).numel() for _, shape in self.layout]
        return {name: part.view(s) for (name, s), part in zip(self.layout, self.value.split(sizes), strict=True)}
