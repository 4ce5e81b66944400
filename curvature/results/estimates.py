"""What the estimators return: the answer, its uncertainty and its price.

All are frozen dataclasses of detached tensors. Spectra are stored in descending order with eigenvectors as columns.
`num_matvecs` counts products with single columns: one product with a block of k columns counts k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from curvature.results.intervals import interval_factor, skewness
from curvature.results.record import Result

__all__ = [
    "BoundedEstimate",
    "DiagonalEstimate",
    "EigenPairs",
    "Estimate",
    "NormBounds",
    "SpectralDensity",
    "Status",
    "TraceEstimate",
    "bounded_mean",
    "mean_and_stderr",
    "mixtures",
    "stderr_of_weighted_mean",
]


class Status(Enum):
    """How an iteration ended. The text is the advice."""

    CONVERGED = "converged"
    MAX_MATVECS = (
        "product limit reached before every residual fell below the tolerance; raise max_matvecs or loosen rtol"
    )
    MAX_PROBES = (
        "probe limit reached before the standard error fell below the tolerance; raise max_probes or loosen rtol"
    )
    BUDGET = "all probes of the budget were spent; no accuracy was asked for"
    STAGNATED = "residuals stopped falling at the rounding level of the operator; loosen rtol or use a wider dtype"
    WITHIN_NOISE = (
        "residuals may exceed the tolerance by the rounding error of products, which product_noise states; loosen "
        "rtol, or compute in a wider dtype: model.double(), or where it is below float32 model.float(), no autocast"
    )
    MAX_RANK = (
        "rank limit reached before the bound on the error fell below the tolerance; raise max_rank or loosen rtol, and "
        "where the spectrum decays slowly take only its outer pairs, with eigsh"
    )
    SLOW_DECAY = (
        "residuals exceed the tolerance, since the spectrum decays too slowly for this sketch; raise power_iterations "
        "or oversampling, or call eigsh, which iterates until they do not"
    )
    DEFLATION_INEXACT = (
        "the deflated vectors are less accurate than the tolerance and leave their mark on the residuals; compute them "
        "to a smaller rtol, or pass them in v0 instead"
    )
    MAX_ITERATIONS = (
        "iteration limit reached before the residual fell below the tolerance; raise max_iterations, loosen rtol, add "
        "damping or precondition"
    )
    MAX_STEPS = "step limit reached before the error fell below the tolerance; raise num_steps or loosen rtol"
    UNCERTIFIED = (
        "every residual is below the tolerance, but that no eigenvalue was missed could not be shown with the "
        "confidence asked for; raise max_matvecs or num_basis, or pass confidence=None to do without"
    )
    STOPPED = "the stopping rule that was passed ended the iteration"
    BOUNDARY = "the model's minimiser lies on the boundary of the trust region"
    NEGATIVE_CURVATURE = (
        "a direction of no positive curvature was met: the matrix is indefinite, or singular with a right-hand side "
        "outside its range; add damping, or use minres"
    )
    LEAST_SQUARES = (
        "the system has no solution within the tolerance, and x minimises the residual instead; accept it as that, or "
        "add damping"
    )

    @property
    def ok(self) -> bool:
        """Whether what was asked for was reached."""
        return self in (Status.CONVERGED, Status.BUDGET, Status.STOPPED, Status.BOUNDARY)


@dataclass(frozen=True, kw_only=True, repr=False)
class EigenPairs(Result):
    """Some eigenpairs of a symmetric matrix A of size n, eigenvalues descending.

    Every pair satisfies |A u - lambda u| = residual_norm with |u| = 1, so an exact eigenvalue lies within
    `residual_norms` of each entry of `eigenvalues` (Bauer-Fike for symmetric matrices). They hold the rounding error of
    a model's products, which is measured once (`product_noise`).
    """

    _figure = "plot_eigenvalues"
    _large = ("eigenvectors",)

    eigenvalues: Tensor
    """(k,), descending; units of A."""
    eigenvectors: Tensor
    """(n, k), orthonormal columns."""
    residual_norms: Tensor
    """(k,), |A u - lambda u|_2; units of A."""
    converged: Tensor
    """(k,), bool: whether the residual is below the tolerance asked for."""
    num_matvecs: int
    """Products with A that were spent."""
    status: Status
    """How the iteration ended."""
    rtol: float
    """Tolerance asked for: residual <= max(rtol * |eigenvalue|, atol), with a floor at rounding."""
    method: str = ""
    """Which method ran and why, from `eigsh`."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype; `residual_norms`
    hold twice that, in units of the largest eigenvalue that was met. None in float64."""
    miss_probability: float = math.nan
    """Bound on the probability, over a random direction, that an eigenvalue was missed that belongs among these and
    differs from the last of them by more than its tolerance; 0 after a search of the whole space, NaN if nobody asked.
    """

    def _outcome(self) -> str:
        done = int(self.converged.sum())
        return f"{done} of {len(self.converged)} eigenpairs converged in {self.num_matvecs} products"


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """A number, or several, and how far chance may have moved it."""

    value: Tensor
    """Any shape."""
    stderr: Tensor
    """Of the same shape: standard error of `value` over the probes."""
    dof: float = math.inf
    """Degrees of freedom of `stderr`: probes less one; infinite where nothing is left to chance."""
    skewness: Tensor | float = 0.0
    """Of one probe's numbers, of the shape of `value`; dimensionless."""
    data_stderr: Tensor | None = None
    """Of the same shape: standard error over data of the same size. None if not asked for, or for too few data."""
    data_dof: float = math.inf
    """Degrees of freedom of `data_stderr`: groups of the data less one."""
    num_matvecs: int = 0
    """Products with A that were spent; none where it follows from others."""
    status: Status = Status.BUDGET
    """Whether the accuracy that was asked for was reached."""
    method: str = ""
    """Which estimator gave the value, where there is a choice."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype. None in float64."""

    def half_width(self, confidence: float = 0.95) -> Tensor:
        """Return h: `value` +- h covers the truth with this probability, entry by entry; see `interval_factor`."""
        return self.stderr * interval_factor(self.dof + 1, self.skewness, confidence)

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of intervals that each cover with this probability; see `interval_factor`."""
        reach = self.half_width(confidence)
        return self.value - reach, self.value + reach

    def _outcome(self) -> str:
        about = f"{self.value:.4g} +- {self.stderr:.1g} " if self.value.ndim == 0 else ""
        return f"{about}after {self.num_matvecs} products"


@dataclass(frozen=True, kw_only=True, repr=False)
class BoundedEstimate(Estimate):
    """An estimate by quadrature: `value` errs by chance, as `stderr` says, and by the rule, as the bounds say."""

    lower: Tensor
    """Of the same shape: what an exact rule would give for the same probes is no smaller, ..."""
    upper: Tensor
    """... and no larger than this."""

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the bounds, widened by the chance of the probes for this confidence."""
        reach = self.half_width(confidence)
        return self.lower - reach, self.upper + reach


@dataclass(frozen=True, kw_only=True, repr=False)
class NormBounds(Result):
    """Bounds on a norm of A."""

    lower: Tensor
    """(), units of A: the norm is no smaller, ..."""
    upper: Tensor
    """(), and, but for the failure probability, no larger than this."""
    failure_probability: float
    """Of the upper bound being too low, over the random start."""
    num_matvecs: int
    """Products with A that were spent."""
    status: Status
    """Whether the bounds are as close as was asked for."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TraceEstimate(Estimate):
    """An estimate of tr A. `method` is "hutchinson", "hutch++", "xtrace", "xnystrace", "mixed" or "exact"."""

    samples: Tensor
    """(num_probes,), one unbiased estimate a probe; `value` is their mean."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalEstimate(Estimate):
    """An estimate of diag A, (n,). `method` is "hutchinson", "xdiag", "mixed" or "exact"."""

    _large = ("value", "stderr", "samples")

    samples: Tensor | None = None
    """(n, num_probes), one estimate a probe, where they were kept; `value` is their mean."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectralDensity(Result):
    """The eigenvalue density of a symmetric matrix A of size n, by stochastic Lanczos quadrature.

    phi(t) = (1/n) sum_i N(t; lambda_i, sigma^2), estimated as the mean over probes of sum_k weights_k N(t; nodes_k,
    sigma^2).
    """

    _figure = "plot_spectral_density"
    _curves = ("grid", "density", "stderr", "nodes", "weights", "deflated", "rule")

    grid: Tensor
    """(num_points,), ascending; units of A."""
    density: Tensor
    """(num_points,), integrates to 1; 1 / units of A."""
    stderr: Tensor
    """(num_points,), standard error of `density` over the probes."""
    nodes: Tensor
    """(num_probes, num_steps), Ritz values of each probe's run, ascending; unused places hold 0 with weight 0."""
    weights: Tensor
    """(num_probes, num_steps), quadrature weights; each row sums to 1."""
    sigma: float
    """Standard deviation of the Gaussian that smooths the density; units of A."""
    dimension: int
    """n."""
    num_matvecs: int
    """Products with A that were spent."""
    num_steps: int | None = 1
    """s: the rule of each probe is exact to degree 2 s - 1. None if its nodes are all that the probe sees. The
    default, the least, is that of runs of an earlier version: counts of them are hardly bounded."""
    deflated: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """(p,), eigenvalues that were known and taken out of the quadrature; among the nodes with weight 1/n each."""
    rule: Tensor | None = None
    """(num_points,), error of the quadrature in `density`, judged by half and two thirds of the steps: large where
    features are narrower than the spectrum over `num_steps`. None where it was not judged. It holds what
    rounding of products changes, too."""
    product_noise: float | None = None
    """Relative rounding error of products, as measured on one batch in a wider dtype. None in float64."""

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return bands that cover the smoothed density at each point with this probability, (num_points,) each.

        By `interval_factor` over the probes, whose parts of a few eigenvalues that stand alone are squares of normal
        numbers, far from normal, with the error of the quadrature added on both sides.
        """
        samples = mixtures(self.grid, self.nodes, self.weights, self.sigma)
        alike = torch.full_like(self.deflated, 1 / self.dimension)
        known = mixtures(self.grid, self.deflated[None], alike[None], self.sigma)[0]
        reach = self.stderr * interval_factor(len(self.weights), skewness(samples, known), confidence)
        reach = reach if self.rule is None else reach + self.rule
        return self.density - reach, self.density + reach

    @property
    def is_known(self) -> Tensor:
        """(num_probes, m), bool: which nodes are `deflated` eigenvalues."""
        return (self.nodes[..., None] == self.deflated).any(dim=-1) & (self.weights == 1 / self.dimension)

    def expectation(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Estimate (1/n) tr f(A) and its standard error over the probes; `f` acts entrywise on eigenvalues."""
        samples = (self.weights * f(self.nodes)).sum(dim=1)
        return mean_and_stderr(samples)


def mixtures(grid: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """Return sum_k weights_ik N(grid; nodes_ik, sigma^2) for each row i, of nodes and weights (p, m), (p, points)."""
    if bool((nodes == nodes[0]).all()):  # a rule of a block: all probes share its exponentials
        return weights @ _bumps(grid, nodes[0], sigma).T
    return torch.stack([_bumps(grid, x, sigma) @ w for x, w in zip(nodes, weights, strict=True)])


def _bumps(grid: Tensor, nodes: Tensor, sigma: float) -> Tensor:
    """Return N(grid; nodes_k, sigma^2), (points, m)."""
    z = (grid[:, None] - nodes).div_(sigma)
    return z.square_().mul_(-0.5).exp_().div_(sigma * (2 * torch.pi) ** 0.5)


def bounded_mean(
    samples: Tensor, lower: Tensor, upper: Tensor, ends: tuple[Tensor | float, Tensor | float]
) -> BoundedEstimate:
    """Return the mean over probes of numbers (num_probes, ...), and of the bounds of each.

    The error by chance is the largest of the three means': numbers of quadrature rules that all agree may be bounded by
    numbers that do not. No number can be less than the first of the `ends` or more than the other.
    """
    parts = [mean_and_stderr(x) for x in (samples, lower, upper)]
    value, least, most = (mean for mean, _ in parts)
    return BoundedEstimate(
        value=value,
        stderr=torch.stack([stderr for _, stderr in parts]).amax(dim=0),
        dof=len(samples) - 1.0,
        skewness=torch.stack([skewness(x, end).abs() for x in (samples, lower, upper) for end in ends]).amax(dim=0),
        lower=torch.minimum(least, value),
        upper=torch.maximum(most, value),
    )


def mean_and_stderr(samples: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Return the mean over `dim` and its standard error, s / sqrt(k); infinite for a single sample."""
    count = samples.shape[dim]
    mean = samples.mean(dim)
    if count < 2:
        return mean, torch.full_like(mean, torch.inf)
    return mean, samples.std(dim) / count**0.5


def stderr_of_weighted_mean(values: Tensor, shares: Tensor) -> Tensor:
    """Return one standard error of x = sum_b p_b x_b over further data, from B values (B, ...) and their shares (B,).

        stderr^2 = sum_b p_b^2 (x_b - x)^2 / (1 - p_b)

    It is that of a ratio of sums, whatever makes the shares differ, sizes of batches or weights of classes, and s^2 / B
    where they are equal. NaN for a single value.
    """
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    p = shares.to(values).reshape(-1, *(1,) * (values.ndim - 1))
    terms = p.square() / (1 - p).clamp_min(torch.finfo(values.dtype).eps)  # next to one, all others weigh nothing
    return (terms * (values - (p * values).sum(0)).square()).sum(0).sqrt()
