"""What looks at the loss away from a point return: curves, surfaces and paths, each beside its quadratic model.

Nothing here knows a model of a network: figures and reports are made from these records alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvature.results.record import Result

__all__ = ["Direction", "Landscape", "LandscapeCost", "LossPath", "LossPlane", "LossSlice", "Trajectory"]

_ROUNDING = 32  # units in the last place of a loss that a sum over the data may be wrong by


@dataclass(frozen=True, kw_only=True, repr=False)
class Direction(Result):
    """A direction in the space of the parameters, and how long a step of 1 along it is."""

    _large: ClassVar[tuple[str, ...]] = ("vector",)

    name: str
    """For people: "random 1", "eigenvector 2"."""
    kind: str
    """"random", "eigenvector", "gradient", "checkpoint", "trajectory" or "custom"."""
    scaling: str
    """How its length was set: "filter", "layer", "raw", "unit" or "difference"; see `analysis.landscape.directions`."""
    norm: float
    """|d|, Euclidean; parameter."""
    vector: Tensor
    """d, (n,), in the order of the objective's space; parameter."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LossSlice(Result):
    """The loss along a direction, L(theta + t d), and the quadratic model L + t g'd + t^2 d'Hd / 2."""

    _figure = "plot_slice"

    direction: Direction
    """d."""
    steps: Tensor
    """t, (P,), ascending; without unit: |d| is in the direction."""
    losses: Tensor
    """(P,); NaN where the loss is not finite."""
    stderr: Tensor
    """(P,), one standard error over data of the same size; NaN where the data came in a single batch."""
    centre: float
    """L(theta)."""
    slope: float
    """g'd; loss."""
    curvature: float
    """d'Hd, from one exact product; loss."""
    rounding: float
    """Relative spacing of the numbers the loss is computed in."""

    def model(self, steps: Tensor | None = None) -> Tensor:
        """Return the quadratic model at `steps`, by default those of the slice."""
        t = self.steps if steps is None else steps
        return self.centre + self.slope * t + self.curvature * t.square() / 2

    def quadratic_radius(self, deviation: float = 0.1) -> float:
        """Return the largest r such that the model holds wherever |t| <= r, to a relative deviation.

        It holds at t if |L(t) - model(t)| <= deviation (|t g'd| + t^2 |d'Hd| / 2) + rounding. The bracket is the
        predicted change with its two terms not allowed to cancel, which they do where the parabola crosses L(0) again.
        Between neighbouring steps the deviation over the bracket is taken to be linear, and to start at 0 for t = 0: so
        a radius below the first step is an extrapolation, exact for a cubic along a direction without slope. Infinite
        if the model holds at all steps.
        """
        t, excess = self.steps.double(), (self.losses - self.model()).abs().double()
        bracket = (t * self.slope).abs() + t.square() * abs(self.curvature) / 2
        noise = _ROUNDING * self.rounding * max(abs(self.centre), float(self.losses.nan_to_num().abs().max()))
        radii = [math.inf]
        for side in (t > 0, t < 0):
            order = t[side].abs().argsort()
            ratios = ((excess - noise).clamp_min(0) / bracket.clamp_min(torch.finfo(torch.float64).tiny))[side][order]
            before, ratio_before = 0.0, 0.0
            for now, ratio in zip(t[side].abs()[order].tolist(), ratios.tolist(), strict=True):
                if not ratio <= deviation:  # also where the loss is not finite
                    share = (deviation - ratio_before) / (ratio - ratio_before) if math.isfinite(ratio) else 0.0
                    radii.append(before + share * (now - before))
                    break
                before, ratio_before = now, ratio
        return min(radii)


@dataclass(frozen=True, kw_only=True, repr=False)
class Trajectory(Result):
    """Checkpoints seen in a plane: their projections and their distances from it."""

    names: tuple[str, ...]
    """Of the k checkpoints, in order of time."""
    coordinates: Tensor
    """(k, 2), of the projections, in units of the plane's two directions."""
    distances: Tensor
    """(k,), from the plane, Euclidean; parameter. The loss at a foot is not that of the checkpoint."""
    losses: Tensor
    """(k,), at the checkpoints themselves, with their own buffers."""
    explained: tuple[float, float]
    """Share of the sum of squared distances from the centre that lies along each direction; 0 to 1."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LossPlane(Result):
    """The loss on a grid, L(theta + x d1 + y d2), and the quadratic model in the plane."""

    _figure = "plot_plane"

    first: Direction
    """d1."""
    second: Direction
    """d2."""
    x: Tensor
    """(P,), ascending, in units of d1."""
    y: Tensor
    """(Q,), ascending, in units of d2."""
    losses: Tensor
    """(Q, P); NaN where the loss is not finite."""
    stderr: Tensor
    """(Q, P), one standard error over data of the same size; NaN where the data came in a single batch."""
    centre: float
    """L(theta)."""
    gradient: Tensor
    """(2,), g'd1 and g'd2; loss."""
    hessian: Tensor
    """(2, 2), d_i'H d_j, from two exact products; loss."""
    cosine: float
    """Of the angle between d1 and d2: 0 where the picture keeps angles."""
    trajectory: Trajectory | None
    """Checkpoints in this plane, if there are any."""

    def model(self) -> Tensor:
        """Return the quadratic model on the grid, (Q, P)."""
        x, y = self.x[None, :], self.y[:, None]
        bend = self.hessian[0, 0] * x**2 + 2 * self.hessian[0, 1] * x * y + self.hessian[1, 1] * y**2
        return self.centre + self.gradient[0] * x + self.gradient[1] * y + bend / 2


@dataclass(frozen=True, kw_only=True, repr=False)
class LossPath(Result):
    """The loss along a path from one set of parameters to another."""

    _figure = "plot_paths"

    kind: str
    """"straight", or "curved": a quadratic Bezier curve through a trained bend."""
    start: str
    """Name of the parameters at t = 0."""
    end: str
    """Name of the parameters at t = 1."""
    positions: Tensor
    """t, (P,), from 0 to 1."""
    losses: Tensor
    """(P,); NaN where the loss is not finite."""
    stderr: Tensor
    """(P,), one standard error over data of the same size; NaN where the data came in a single batch."""
    length: float
    """Length of the path, Euclidean; parameter."""
    num_gradients: int
    """Gradients spent on the bend; 0 for a straight path."""

    @property
    def barrier(self) -> float:
        """max_t of L(t) - ((1 - t) L(0) + t L(1)) over the positions; loss. At least 0; NaN if a loss is not finite.

        Reference: Entezari et al. (2022), The role of permutation invariance in linear mode connectivity.
        """
        return float(self._rise().max())

    @property
    def barrier_position(self) -> float:
        """Where the barrier is highest."""
        return float(self.positions[self._rise().argmax()])

    def _rise(self) -> Tensor:
        return self.losses - torch.lerp(self.losses[0], self.losses[-1], self.positions)


@dataclass(frozen=True, kw_only=True, repr=False)
class LandscapeCost(Result):
    """What it took."""

    num_losses: int
    """Looks at the loss on all data: forward passes."""
    num_known: int
    """Of these, how many an earlier call had left behind."""
    num_matvecs: int
    """Hessian products, those for eigenvectors included."""
    num_gradients: int
    """Gradients, those for a bend included."""
    seconds: float
    """Of this call."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Result):
    """The loss around a point: along lines, on a plane, and on paths to another point."""

    loss: float
    """At the point."""
    gradient_norm: float
    """|g|, Euclidean; loss / parameter."""
    parameter_norm: float
    """|theta| of the chosen parameters, Euclidean; parameter."""
    num_params: int
    total_weight: float
    """Loss terms that the objective is a mean over."""
    num_batches: int
    """Pieces the data came in; errors over the data come from two or more."""
    dtype: str
    device: str
    slices: tuple[LossSlice, ...]
    """One for each direction."""
    plane: LossPlane | None
    """The plane of the first two directions; None if it was not asked for."""
    paths: tuple[LossPath, ...]
    """To another checkpoint: straight, and curved if there was a budget for it."""
    cost: LandscapeCost
    notes: tuple[str, ...]
    """What a reader should know about how it was computed."""
