"""What is known of a point of a loss: whether it is critical, of which kind, and where the loss falls from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from analysis.records.measured import Bounded, Measured
from curvature.results.record import Result

__all__ = ["CriticalPoint", "EscapeLine", "PointKind", "Symmetry"]

PointKind = Literal[
    "not critical",
    "minimum",
    "minimum to second order",
    "saddle",
    "maximum",
    "maximum to second order",
    "plateau",
    "undecided",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class EscapeLine(Result):
    """The loss along the direction of most negative curvature, or, where there is none, of least curvature."""

    steps: Tensor
    """(m,), ascending, 0 among them; units of the parameters. Steps above 0 go the way that the gradient falls."""
    losses: Tensor
    """(m,), L; NaN where it overflows."""
    slope: float
    """g'u; loss / parameter."""
    curvature: float
    """u'Hu; loss / parameter^2."""

    @property
    def model(self) -> Tensor:
        """(m,), L + t g'u + t^2 u'Hu / 2."""
        base = self.losses[self.steps == 0]
        return base + self.slope * self.steps + self.curvature * self.steps.square() / 2

    @property
    def drop(self) -> float:
        """How far the loss falls below its value at the point, at most; units of the loss, 0 where it rises."""
        base = self.losses[self.steps == 0]
        return float((base - self.losses).nan_to_num(nan=-torch.inf).max())

    def falls(self, tolerance: float, eps: float) -> bool:
        """Return whether the loss falls from the point on, either way, by more than slope and tolerance explain.

        Args:
            tolerance: of the curvature; loss / parameter^2.
            eps: relative rounding of the losses.
        """
        here = int((self.steps == 0).nonzero()[0])
        change = self.losses - self.losses[here] - self.slope * self.steps
        allowed = tolerance * self.steps.square() / 2 + 10 * eps * self.losses.abs().nan_to_num(posinf=0.0).max()
        for way in (change[here:], change[: here + 1].flip(0)):
            downhill = int((way.diff() < 0).long().cumprod(0).sum())
            if bool((way[: downhill + 1] < -allowed[here : here + downhill + 1]).any()):  # the same on both sides
                return True
        return False


@dataclass(frozen=True, kw_only=True, repr=False)
class Symmetry(Result):
    """What happened when the scales of some parameters were changed."""

    name: str
    """Which layers, in words."""
    loss_change: float
    """Largest |L(exp(+-t D) theta) - L| / |L| for factors 1.5 and 1 / 1.5; of the order of rounding for a symmetry."""
    gradient_residual: float
    """|g'v| / (|g| |v|), a cosine; 0 for a symmetry."""
    hessian_residual: float
    """|H v + D g| / (|H v| + |D g|); 0 for a symmetry."""
    holds: bool
    """Whether all three vanish up to rounding."""


@dataclass(frozen=True, kw_only=True, repr=False)
class CriticalPoint(Result):
    """One point of a loss, judged by gradient and curvature."""

    _figure = "plot_escape"
    _large: ClassVar[tuple[str, ...]] = ("direction",)

    kind: PointKind
    """What the numbers below come to."""
    why: str
    """In words."""
    loss: float
    """L."""
    gradient_norm: float
    """|g|; loss / parameter."""
    gradient_noise: float | None
    """(E |g - E g|^2)^(1/2) from the spread of per-example gradients: what |g| would be with these many examples if the
    gradient of all data of interest were zero; loss / parameter. None where examples cannot be taken one by one."""
    noise_dimension: float | None = None
    """Effective number of directions of that noise, (tr C)^2 / tr C^2; None where inner products were not available."""
    p_value: float | None
    """How likely so large a |g| is if that gradient is zero (large N), see `gradient_p_value`; None like the noise."""
    lowest: Measured
    """Smallest eigenvalue found, and the residual it is certified with; loss / parameter^2."""
    largest: Measured
    """Largest eigenvalue; loss / parameter^2."""
    tolerance: float
    """Eigenvalues within this of zero count as zero; loss / parameter^2."""
    index_at_least: int
    """That many eigenvalues are negative, below -tolerance: as many orthonormal directions with such Ritz values
    exist, and H has no fewer negative eigenvalues than any compression of it (Courant-Fischer)."""
    index: Bounded
    """Number of eigenvalues below -tolerance: 95 % bounds from the density, no smaller than `index_at_least`."""
    nullity: Bounded
    """Number of eigenvalues within the tolerance: 95 % bounds from the density."""
    exact: bool
    """Whether H was built entry by entry, so that both counts are certain."""
    direction: Tensor
    """(n,), unit eigenvector of the smallest eigenvalue, its sign such that g'u <= 0."""
    escape: EscapeLine
    """The loss along it."""
    symmetries: tuple[Symmetry, ...]
    """Scales of layers that were tried; those that hold are flat directions whatever the data."""
    num_matvecs: int
    """Products with H."""
    notes: tuple[str, ...]
    """What a reader should know."""
