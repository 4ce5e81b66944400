"""What the analyses return: frozen trees of numbers, each with its uncertainty and its price.

Nothing here knows a model: figures, reports and stored runs are made from these records alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from analysis.records.measured import Measured
from analysis.run.meter import Cost
from curvature.layerwise.diagonal_summary import DiagonalRow
from curvature.results.estimates import EigenPairs, SpectralDensity, TraceEstimate
from curvature.results.record import Result

__all__ = [
    "DataErrors",
    "Inspection",
    "LayerCoupling",
    "LayerCurvature",
    "LayerDiagonals",
    "LowRankError",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class DataErrors(Result):
    """How far numbers would move with other data of the same size: one standard error, by the jackknife.

    Groups of batches are left out in turn. With G groups an error is itself known to about (2 (G - 1))^(-1/2).
    """

    _large: ClassVar[tuple[str, ...]] = ("density", "nodes", "weights")

    num_groups: int
    """G."""
    top: Tensor
    """(k,), of the largest eigenvalues; loss / parameter^2."""
    bottom: Tensor
    """(b,), of the smallest; loss / parameter^2."""
    trace: float
    """Of the trace; loss / parameter^2."""
    density: Tensor
    """(num_points,), of the density on its grid; parameter^2 / loss."""
    shares: Tensor
    """(G,), share of each group in the total weight."""
    nodes: Tensor
    """(G, m), nodes of the quadrature without each group; loss / parameter^2."""
    weights: Tensor
    """(G, m), their weights, means over the probes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerCurvature(Result):
    """The diagonal block of the Hessian that belongs to one module's own parameters, all others held fixed."""

    name: str
    """Name of the module in the model."""
    num_params: int
    """Size of the block."""
    gradient_norm: float
    """Euclidean norm of the layer's part of the gradient; loss / parameter. Exact up to rounding."""
    top: float
    """Largest eigenvalue of the block (the layer's sharpness); loss / parameter^2."""
    top_residual: float
    """An eigenvalue lies within this of `top`; loss / parameter^2."""
    bottom: float
    """Smallest eigenvalue of the block; loss / parameter^2."""
    bottom_residual: float
    """An eigenvalue lies within this of `bottom`; loss / parameter^2."""
    trace: Measured
    """Trace of the block; loss / parameter^2. The traces of all layers add up to the trace of the Hessian."""
    effective_condition: Measured
    """Largest eigenvalue over the mean absolute eigenvalue of the block; a ratio, at least 1 if no eigenvalue is
    negative."""
    negative_share: Measured
    """Sum of the absolute negative eigenvalues over the sum of all absolute eigenvalues of the block; 0 to 1."""
    converged: bool
    """Whether `top` and `bottom` reached the tolerance asked for."""
    exact: bool
    """Whether the block was built entry by entry, which leaves rounding as the only error."""
    num_matvecs: int
    """Products with the block that were spent."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerCoupling(Result):
    """Frobenius norms |H_ab|_F of the blocks of the Hessian between layers a and b."""

    _figure = "plot_layer_coupling"
    _also = ("relative",)

    names: tuple[str, ...]
    """Of the L layers: the modules that own parameters, in the model's order."""
    num_params: tuple[int, ...]
    """Their sizes."""
    norms: Tensor
    """(L, L), symmetric; loss / parameter^2. The root of the sum of squares of all entries is |H|_F."""
    stderr: Tensor
    """(L, L), standard error of `norms` over the probes; 0 where the block was built entry by entry."""
    num_matvecs: int
    """Products with the Hessian that were spent."""

    @property
    def relative(self) -> Tensor:
        """(L, L), |H_ab|_F / (|H_aa|_F |H_bb|_F)^(1/2): 1 on the diagonal, 0 for layers that do not act on each other.

        At most 1 where the Hessian is positive semi-definite; infinite or NaN beside a layer of no curvature.
        """
        own = self.norms.diagonal().sqrt()
        return self.norms / (own[:, None] * own)


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerDiagonals(Result):
    """The diagonal of the Hessian, layer by layer: what diagonal methods divide by and pruning uses."""

    _figure = "plot_layer_diagonals"

    rows: tuple[DiagonalRow, ...]
    """One for each module that owns parameters, in the order of the model; loss / parameter^2."""
    exact: bool
    """Whether every entry is exact up to rounding; otherwise single entries are noisy, as `relative_noise` says."""
    how: str
    """How it was computed, and why not exactly, in words."""

    @property
    def traces(self) -> dict[str, Measured]:
        """The trace of each layer's block by name, from the entries; loss / parameter^2."""
        return {
            row.name: Measured(
                value=row.num_params * row.mean,
                stderr=math.nan if row.mean_stderr is None else row.num_params * row.mean_stderr,
            )
            for row in self.rows
        }

    @property
    def trace(self) -> float:
        """The sum of all entries; loss / parameter^2."""
        return sum(trace.value for trace in self.traces.values())


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRankError(Result):
    """How far the best approximations of low rank are from a symmetric matrix A, in the Frobenius norm."""

    _figure = "plot_low_rank_error"

    ranks: Tensor
    """(m,), ascending, 1 to n."""
    error: Tensor
    """(m,), |A - A_r|_F / |A|_F: 1 where the r largest eigenvalues in magnitude hold nothing, 0 where they hold all."""
    stderr: Tensor
    """(m,), one standard error over the probes and the error of the quadrature, root of squares."""
    data: Tensor | None
    """(m,), one standard error over data of the same size; None where it is not known."""

    def rank_for(self, error: float) -> int:
        """Return the smallest of the ranks whose error is no larger than this; the last where none is."""
        reached = (self.error <= error).nonzero()
        return int(self.ranks[reached[0, 0] if len(reached) else -1])


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Result):
    """The curvature of a loss at one point: its value, its gradient and the spectrum of its Hessian H."""

    _figure = "plot_spectral_density"

    loss: float
    """L, in the unit of the loss. Exact up to rounding."""
    gradient_norm: float
    """Euclidean norm of the gradient of L; loss / parameter. Exact up to rounding."""
    num_params: int
    """Number of parameters that L is a function of: the size of H."""
    total_weight: float
    """Number of loss terms that L averages over (sum of the weights of the batches)."""
    dtype: str
    """Precision of products and results."""
    device: str
    """Where they were computed."""
    top: EigenPairs
    """The largest eigenvalues of H; loss / parameter^2."""
    bottom: EigenPairs
    """The smallest eigenvalues of H; loss / parameter^2."""
    trace: TraceEstimate
    """tr H, from the probes of `density`; loss / parameter^2."""
    density: SpectralDensity
    """The density of the eigenvalues of H, with the top eigenpairs taken out of the sampling and put back exactly."""
    mean_absolute_eigenvalue: Measured
    """(1 / n) sum |lambda_i|; loss / parameter^2."""
    effective_condition: Measured
    """lambda_max over the mean of |lambda|; a ratio."""
    negative_share: Measured
    """sum of |lambda| over negative lambda, over sum of |lambda|; 0 to 1."""
    layers: tuple[LayerCurvature, ...]
    """The same for each module that owns parameters, in the order of the model; empty if it was not asked for."""
    coupling: LayerCoupling | None
    """How strongly layers act on each other; None if it was not asked for."""
    diagonal: LayerDiagonals | None
    """The diagonal of H layer by layer; None if it was not asked for."""
    low_rank: LowRankError
    """How far the best approximations of H of each rank are from it."""
    exact: bool
    """Whether H was built entry by entry, which leaves rounding as the only error."""
    data: DataErrors | None
    """What chance in the choice of the data makes of it; None if they came in too few batches."""
    cost: Cost
    """Products, time and memory spent."""
    notes: tuple[str, ...]
    """What a reader should know about how the objective was evaluated."""

    @property
    def sharpness(self) -> Measured:
        """The largest eigenvalue of H and the residual it is certified with; loss / parameter^2."""
        data = math.nan if self.data is None else float(self.data.top[0])
        value, residual = float(self.top.eigenvalues[0]), float(self.top.residual_norms[0])
        return Measured(value=value, stderr=residual, residual=True, data_stderr=data, data_dof=self._data_dof)

    @property
    def lowest(self) -> Measured:
        """The smallest eigenvalue of H and the residual it is certified with; loss / parameter^2."""
        data = math.nan if self.data is None else float(self.data.bottom[-1])
        value, residual = float(self.bottom.eigenvalues[-1]), float(self.bottom.residual_norms[-1])
        return Measured(value=value, stderr=residual, residual=True, data_stderr=data, data_dof=self._data_dof)

    @property
    def total_curvature(self) -> Measured:
        """The trace of H with the spread over the probes; loss / parameter^2."""
        data = math.nan if self.data is None else self.data.trace
        return Measured(
            value=float(self.trace.value),
            stderr=float(self.trace.stderr),
            data_stderr=data,
            dof=self.trace.dof,
            data_dof=self._data_dof,
            skewness=float(self.trace.skewness),
        )

    @property
    def _data_dof(self) -> float:
        return math.inf if self.data is None else self.data.num_groups - 1.0

    @property
    def max_stable_lr(self) -> Measured:
        """2 / lambda_max: a larger step of gradient descent grows along the sharpest direction; inf without one."""
        top = self.sharpness
        if top.value <= 0:
            return Measured(value=math.inf, stderr=0.0)
        slope = 2 / top.value**2
        return replace(top, value=2 / top.value, stderr=slope * top.stderr, data_stderr=slope * top.data_stderr)

    def extreme_eigenvalues(self) -> list[tuple[int, float, float, bool]]:
        """Return (rank, eigenvalue, residual, converged) of the pairs at both ends, by rank from 1; none twice."""
        n = self.num_params
        ranked: dict[int, tuple[int, float, float, bool]] = {}
        for pairs, first in ((self.bottom, n - len(self.bottom.eigenvalues) + 1), (self.top, 1)):
            entries = zip(
                pairs.eigenvalues.tolist(), pairs.residual_norms.tolist(), pairs.converged.tolist(), strict=True
            )
            ranked |= {first + i: (first + i, *entry) for i, entry in enumerate(entries)}
        return [ranked[rank] for rank in sorted(ranked)]
