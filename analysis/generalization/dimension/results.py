"""Effective dimensions over a grid of regularisers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.results.record import Result

__all__ = ["EffectiveDimension", "MatrixDimension"]


@dataclass(frozen=True, kw_only=True, repr=False)
class MatrixDimension(Result):
    """d(alpha) = sum_i lambda_i / (lambda_i + alpha) of one matrix, over its eigenvalues above 0."""

    matrix: str
    """"ggn", "hessian" or "kernel" (J J', J the Jacobian of the outputs)."""
    values: Tensor
    """(m,), one for each regulariser."""
    stderr: Tensor
    """(m,), one standard error: over probes, and the error of the quadrature; 0 where all entries were computed."""
    lower: Tensor
    """(m,), with 95 % no smaller; for "ggn" and "kernel" a bound on the rule, by Gauss and Gauss-Radau, ..."""
    upper: Tensor
    """(m,), ... and no larger than this."""
    data_stderr: Tensor
    """(m,), one standard error over other data of the same size, by the jackknife; NaN where it is not known."""
    largest: float
    """Largest eigenvalue of the matrix of the loss summed over its terms ("kernel": of J J' itself)."""
    num_matvecs: int
    """Products that were spent."""
    exact: bool
    """Whether all entries were computed."""


@dataclass(frozen=True, kw_only=True, repr=False)
class EffectiveDimension(Result):
    """How many directions the data determine beside a regulariser, for each of a grid."""

    _figure = "plot_dimension_of"

    regularisers: Tensor
    """(m,), alpha, ascending; beside the loss summed over its terms: alpha is the precision of a prior."""
    matrices: tuple[MatrixDimension, ...]
    """The Gauss-Newton matrix, the Hessian, and the kernel of the outputs where the objective has outputs."""
    num_params: int
    total_weight: float
    """Terms of the loss."""
    loss: str
    """"cross-entropy", "squared error" or the class of another."""
    train_loss: float
    """Mean over the data; the sum, where the loss is one."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    def of(self, matrix: str) -> MatrixDimension:
        """Return the numbers of one matrix."""
        return next(found for found in self.matrices if found.matrix == matrix)

    def at(self, regulariser: float, matrix: str = "ggn") -> float:
        """Return d at a regulariser within the grid, interpolated on its logarithm; NaN outside."""
        x, d = self.regularisers.log(), self.of(matrix).values
        place = math.log(regulariser)
        if not float(x[0]) - 1e-9 <= place <= float(x[-1]) + 1e-9:
            return math.nan
        i = min(max(1, int(torch.searchsorted(x, torch.tensor(place)))), len(x) - 1)
        share = (place - float(x[i - 1])) / (float(x[i]) - float(x[i - 1]))
        return float(d[i - 1] + share * (d[i] - d[i - 1]))

    def summary(self) -> dict[str, Any]:
        """Return the main numbers: d of each matrix at alpha = 1."""
        return {found.matrix: self.at(1.0, found.matrix) for found in self.matrices}
