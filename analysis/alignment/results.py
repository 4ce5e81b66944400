"""What measuring alignment returns: of gradient and updates with the sharpest directions, of subspaces, of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curvature.results.record import Result

__all__ = ["ClassStructure", "GradientAlignment", "SubspaceOverlap", "VectorAlignment"]


@dataclass(frozen=True, kw_only=True, repr=False)
class VectorAlignment(Result):
    """One vector x among the eigenvectors u_1, ..., u_k of the largest eigenvalues."""

    name: str
    """"gradient", or what an update was called."""
    norm: float
    """|x|; its own unit."""
    shares: Tensor
    """(k,), sum_{i <= j} (u_i'x)^2 / |x|^2 for j = 1, ..., k: between 0 and 1; NaN for x = 0."""
    rayleigh: float
    """x'Hx / x'x, the curvature along x; loss / parameter^2. NaN for x = 0."""
    cosine: float
    """Of the angle between x and -g; -1 for the gradient itself, NaN where either is 0."""


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientAlignment(Result):
    """How much of the gradient, and of updates, lies along the sharpest directions."""

    _figure = "plot_alignment"

    num_params: int
    """n."""
    eigenvalues: Tensor
    """(k,), descending; loss / parameter^2."""
    gradient: VectorAlignment
    """Of the gradient."""
    updates: tuple[VectorAlignment, ...]
    """Of other vectors, in the order given."""
    share_error: Tensor
    """(k,): each of `shares` is that of the true subspace to within this: the sine of the angle between the subspaces,
    which Davis and Kahan bound by |residuals|_F / gap; 1 where there is no gap, and nothing is known."""
    num_matvecs: int
    """Products with H."""

    @property
    def chance(self) -> Tensor:
        """(k,), j / n: the mean share of a vector of random direction."""
        k = len(self.eigenvalues)
        return (1 + self.eigenvalues.new_tensor(range(k))) / self.num_params


@dataclass(frozen=True, kw_only=True, repr=False)
class SubspaceOverlap(Result):
    """How much two subspaces of R^n have in common."""

    overlap: float
    """tr(P P') / (k k')^(1/2): 1 for one and the same subspace, 0 for orthogonal ones."""
    chance: float
    """Its mean over random subspaces, (k k')^(1/2) / n."""
    chance_std: float
    """Its standard deviation over these."""
    cosines: Tensor
    """(min(k, k'),), of the principal angles, descending."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ClassStructure(Result):
    """The Gauss-Newton matrix of a classifier as a sum of four: G = class + cross-class + own-class + within."""

    _figure = "plot_class_structure"
    _also = ("shares",)

    _large: ClassVar[tuple[str, ...]] = ("class_factor", "cross_factor", "own_factor")

    num_classes: int
    """C."""
    weights: Tensor
    """(C, C), share of all examples that is of class c and predicted as c', sum_i p_i(c') / N; sums to 1 (to the number
    of terms where the loss sums)."""
    class_factor: Tensor
    """(n, C): the class term is F F', with columns w_c^(1/2) d_c, d_c the mean over c' != c; the outliers."""
    cross_factor: Tensor
    """(n, C (C - 1)): likewise, of d_cc' - d_c; the minor bulk."""
    own_factor: Tensor
    """(n, C): likewise, of d_cc, the pull of the class itself, which goes to 0 as examples are fitted."""
    trace: float
    """tr G; loss / parameter^2."""
    class_eigenvalues: Tensor
    """(C,), of the class term, descending; loss / parameter^2."""
    overlap: SubspaceOverlap | None
    """Of the span of the class term with the eigenvectors passed in."""
    num_pullbacks: int
    """Backward passes through one batch."""

    @property
    def shares(self) -> dict[str, float]:
        """The trace of each term over that of G; they add up to 1."""
        terms = {"class": self.class_factor, "cross-class": self.cross_factor, "own class": self.own_factor}
        shares = {
            name: float(F.double().square().sum()) / self.trace if self.trace else float("nan")
            for name, F in terms.items()
        }
        return {**shares, "within": 1 - sum(shares.values())}
