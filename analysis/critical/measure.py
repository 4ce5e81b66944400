"""Is this point a minimum, a saddle, a plateau, or none of them: the gradient against its noise, curvature by sign.

Reference: Dauphin, Pascanu, Gulcehre, Cho, Ganguli and Bengio (2014), Identifying and attacking the saddle point
problem in high-dimensional non-convex optimization; Szekely and Bakirov (2003), Extremal probabilities for Gaussian
quadratic forms, for the bound on the probability of a gradient so large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import fdtrc
from torch import Tensor

from analysis.critical.results import CriticalPoint, EscapeLine, PointKind
from analysis.critical.symmetries import rescaling_symmetries
from analysis.records.measured import Bounded, Measured
from analysis.records.plan import Plan, from_plan, setting
from analysis.show.listener import Progress, stages
from curvature.arguments import checked, checked_fields
from curvature.environment.autocast import full_precision
from curvature.errors import CheckFailedError, DataError, InputError
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at
from curvature.operators.hessian import HessianOperator
from curvature.per_example import GradientNorms, gradient_dots, gradient_norms
from curvature.spectra.counts import count_between
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["CriticalPlan", "NoiseLaw", "critical_points", "gradient_p_value", "noise_law"]


@dataclass(frozen=True, kw_only=True)
class NoiseLaw:
    """What is known of the covariance C of a mean gradient, from inner products of the examples' gradients."""

    second: float
    """Tr C^2 / (tr C)^2; its inverse is the effective number of directions of the noise."""
    third: float
    """Tr C^3 / (tr C)^3."""
    count: float
    """Degrees of freedom of the examples, their number less one."""


_EXTREMAL = 1.5365  # beyond this ratio one degree of freedom has the heaviest tail of all quadratic forms


@checked
def gradient_p_value(ratio: float, law: NoiseLaw | None = None) -> float:
    """Return the probability of |g|^2 / E|g|^2 >= ratio for a normal g of mean zero and covariance C.

    With c_k = tr C^k / (tr C)^k the shifted chi-squared of nu = c2^3 / c3^2 degrees of freedom that has the first three
    moments of |g|^2, and Fisher's F in its place for the error of tr C (Satterthwaite: (N - 1) / c2 degrees of
    freedom). It is exact where C has one eigenvalue, however often.

    Without a law a bound for any C: of all forms sum_i w_i z_i^2 with z_i standard normal and weights w_i >= 0 that add
    up to 1, a single square has the heaviest tail beyond 1.5365: P <= erfc((ratio / 2)^(1/2)) there, and 1 below.

    Reference: Satterthwaite (1946); Buckley and Eagleson (1988), An approximation to the distribution of quadratic
    forms in normal random variables.
    """
    if law is None:
        return math.erfc((ratio / 2) ** 0.5) if ratio > _EXTREMAL else 1.0
    nu = law.second**3 / law.third**2
    scaled = 1 + (ratio - 1) * law.third / law.second**2  # a chi-squared over its degrees of freedom
    return float(fdtrc(nu, law.count / law.second, scaled)) if scaled > 0 else 1.0


@checked_fields
@dataclass(frozen=True, kw_only=True)
class CriticalPlan(Plan):
    """What to judge a point by."""

    significance: float = setting(0.01, "p-value below which the gradient counts as not zero.", above=0, below=1)
    gradient_tolerance: float | None = setting(
        None, "Length up to which the gradient counts as zero, loss / parameter. Default: rounding.", least=0
    )
    flatness: float = setting(
        1e-3, "Share of the largest |eigenvalue| within which one counts as zero.", above=0, below=1
    )
    num_bottom: int = setting(5, "Smallest eigenpairs to find.", least=1)
    num_probes: int = setting(4, "Probes of the density.", least=1)
    num_steps: int = setting(30, "Block Lanczos steps.", least=1)
    reach: float | None = setting(
        None, "Longest step along the escape line. Default: a tenth of |theta|, or 1 at zero.", above=0
    )
    num_points: int = setting(21, "Losses along it, made odd.", least=3)
    symmetries: bool = setting(True, "Try scales of layers.")

    def spectrum(self, objective: Objective) -> SpectrumPlan:
        """Return the plan of its spectrum."""
        return SpectrumPlan(
            k=1,
            num_bottom=min(self.num_bottom, objective.num_params),
            num_probes=self.num_probes,
            num_steps=self.num_steps,
            num_groups=0,
        )


@in_whole_vectors
@from_plan(CriticalPlan)
@full_precision
@checked
def critical_points(
    objective: Objective, plan: CriticalPlan, *, generator: torch.Generator, progress: Progress | None = None
) -> CriticalPoint:
    """Judge the objective's point: critical or not, and of which kind.

    - "not critical": the gradient is larger than its noise explains (p < significance) and than `gradient_tolerance`.
    - "plateau": no eigenvalue is beyond the tolerance of zero.
    - "saddle": eigenvalues below -tolerance are certain, and others above it; or none is, but the loss falls along a
      direction whose curvature counts as zero. "maximum": none above.
    - "minimum": all eigenvalues found are beyond the tolerance, allowing for residuals. Unless H was built in full, one
      that few directions share may be missed: the bound on the index is certain, its being zero is not.
    - "minimum to second order", "maximum to second order": the same where some eigenvalues count as zero. Terms of
      higher order decide along their directions, and the loss was looked at along one of them only.
    - "undecided": the smallest eigenvalue found is within its residual of the tolerance.

    Over data of finite size a gradient within its noise says that the point may be critical for all data of interest;
    for these very data it is critical only where |g| itself is about zero.

    Cost: inner products of all examples' gradients, where these fit into memory (their norms elsewhere, and p-values
    are then bounds that hold for any covariance, with little power), a spectrum (num_probes x num_steps products),
    `num_points` losses, and with `symmetries` about 6 losses and 2 products for each layer.

    Args:
        objective: the loss at its point.
        plan: settings; or pass them one by one. What rounding leaves of |g| is 10 eps^(1/2) times the root mean square
            of per-example gradients, or 10 eps |H| |theta| if that is larger; a `gradient_tolerance` is needed where
            single gradients are not available.
        generator: source of the probes, on the objective's device.
        progress: told the stages.

    Raises:
        InputError: for settings out of range, or without per-example gradients and without `gradient_tolerance`.
        NonFiniteError: if a product is not finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.zeros_(p)
        >>> data = (torch.ones(4, 1), torch.ones(4, 1))
        >>> point = critical_points(Objective(model, nn.MSELoss(), data), generator=torch.Generator().manual_seed(0))
        >>> point.kind, point.index_at_least, point.escape.drop > 0  # of (1 - v w)^2
        ('saddle', 1, True)
    """
    notes: list[str] = []
    tell = stages(progress, 3 + plan.symmetries)
    tell("gradient and its noise")
    loss, gradient = objective.loss_and_gradient()
    norm = float(gradient.norm())
    noise, floor, law = _noise(objective, plan.gradient_tolerance, notes)
    p_value = None
    if noise is not None:
        p_value = gradient_p_value((norm / noise) ** 2, law) if noise > 0 else float(norm == 0)
    tell("spectrum")
    found = spectrum(HessianOperator(objective), plan.spectrum(objective), generator=generator)
    notes += found.notes
    low, high = found.bottom.eigenvalues, found.top.eigenvalues
    lowest = Measured(value=float(low[-1]), stderr=float(found.bottom.residual_norms[-1]), residual=True)
    largest = Measured(value=float(high[0]), stderr=float(found.top.residual_norms[0]), residual=True)
    tolerance = plan.flatness * max(abs(lowest.value), abs(largest.value))
    if plan.gradient_tolerance is None:  # what rounding of theta makes of the gradient, where single ones vanish, too
        bend = max(abs(lowest.value), abs(largest.value))
        floor = max(floor, 10 * torch.finfo(objective.dtype).eps * bend * float(objective.space.current().norm()))
    at_least = int((low < -tolerance).sum())
    others = count_between(found, low=-tolerance).interval()
    least, most = (len(gradient) - float(end) for end in reversed(others))
    at_least = round(least) if found.exact else at_least
    index = Bounded.between(max(least, at_least), max(most, at_least))
    direction = found.bottom.eigenvectors[:, -1].to(gradient)
    direction = -direction if float(gradient @ direction) > 0 else direction
    tell("along the least curvature")
    escape = _escape(objective, direction, float(gradient @ direction), lowest.value, plan)
    falls = escape.falls(tolerance, torch.finfo(objective.dtype).eps)
    kind, why = _judge(
        norm, floor, p_value, plan.significance, lowest, largest, tolerance, at_least, found.exact, falls
    )
    if plan.symmetries:
        tell("symmetries")
    trials, flat = rescaling_symmetries(objective) if plan.symmetries else ((), None)
    if flat is not None and flat.shape[1] > 1 and int(torch.linalg.matrix_rank(flat)) < flat.shape[1]:
        notes.append("Some of the symmetries that hold are combinations of others.")
    return CriticalPoint(
        kind=kind,
        why=why,
        loss=float(loss),
        gradient_norm=norm,
        gradient_noise=noise,
        noise_dimension=None if law is None else 1 / law.second,
        p_value=p_value,
        lowest=lowest,
        largest=largest,
        tolerance=tolerance,
        index_at_least=at_least,
        index=index,
        nullity=Bounded.between(*map(float, count_between(found, -tolerance, tolerance).interval())),
        exact=found.exact,
        direction=direction,
        escape=escape,
        symmetries=trials,
        num_matvecs=found.num_matvecs + len(trials),
        notes=tuple(notes),
    )


def _noise(objective: Objective, given: float | None, notes: list[str]) -> tuple[float | None, float, NoiseLaw | None]:
    """Return the noise of |g|, the |g| that counts as zero, and what inner products say of the noise."""
    try:
        try:
            norms = gradient_dots(objective)
        except InputError as error:
            norms = gradient_norms(objective)
            notes.append(f"The gradient's p-value is a bound that holds for any noise, of little power: {error}")
    except (CheckFailedError, DataError, InputError) as error:
        if given is None:
            raise InputError(
                f"per-example gradients are not to be had ({error}) so nothing says how large a gradient is noise; "
                "pass gradient_tolerance=."
            ) from error
        notes.append(f"The gradient's noise is not known: {error}")
        return None, given, None
    second = float(norms.trace + norms.mean_squared_norm)
    rounding = 10 * torch.finfo(objective.dtype).eps ** 0.5 * second**0.5
    floor = rounding if given is None else given
    variance = norms.sum_squared_shares * float(norms.unbiased_trace)
    if math.isnan(variance):
        notes.append("One example says nothing of the gradient's noise.")
        return None, floor, None
    return variance**0.5, floor, noise_law(norms)


@checked
def noise_law(norms: GradientNorms) -> NoiseLaw | None:
    """Return the moments of the noise without bias: sums over pairs and triples of different examples.

    They are kept within what moments of a covariance can be; None without inner products, noise, or three examples.
    """
    p = norms.weights / norms.weights.sum()
    N = int((p > 0).sum())
    if norms.dots is None or N < 3:
        return None
    K = norms.dots.double()
    along = K @ p
    K = (K - along[:, None] - along + p @ along) * p[:, None] * p
    total = float(K.trace())
    if not total > 0:
        return None
    apart = (K - torch.diag(K.diagonal())) / (total * N / (N - 1))
    square = apart @ apart
    least = 1 / min(len(norms.mean), N - 1)
    second = min(max(float(square.trace()) * N / (N - 1), least), 1.0)
    third = float((square * apart).sum()) * N**2 / ((N - 1) * (N - 2))
    return NoiseLaw(second=second, third=min(max(third, second**2), second**1.5), count=N - 1.0)


def _judge(
    norm: float,
    floor: float,
    p_value: float | None,
    significance: float,
    lowest: Measured,
    largest: Measured,
    tolerance: float,
    at_least: int,
    exact: bool,
    falls: bool,
) -> tuple[PointKind, str]:
    if norm > floor and (p_value is None or p_value < significance):
        unlikely = "is larger than the tolerance" if p_value is None else f"exceeds its noise (p = {p_value:.1g})"
        return "not critical", f"the gradient {unlikely}"
    line = "the loss falls along the direction of least curvature, which counts as zero"
    if largest.value == lowest.value == 0:
        return "plateau", f"all eigenvalues found are zero; {line if falls else 'terms of higher order decide'}"
    if at_least > 0:
        if largest.value <= tolerance:
            strict = largest.value + largest.stderr < -tolerance
            said = "no eigenvalue found is positive" + ("" if strict else ", but some count as zero")
            return ("maximum" if strict else "maximum to second order"), said
        return "saddle", f"{'' if exact else 'at least '}{at_least} eigenvalues are certainly negative"
    if lowest.value - lowest.stderr < -tolerance:
        return "undecided", "the residual of the smallest eigenvalue reaches below zero; spend more num_steps"
    if lowest.value - lowest.stderr > tolerance:
        sure = "H was built in full" if exact else "though one may have been missed"
        return "minimum", f"all eigenvalues found are positive beyond the tolerance: {sure}"
    if falls:
        return "saddle", f"no eigenvalue is negative beyond the tolerance, but {line}"
    sure = "" if exact else ", though one may have been missed"
    return (
        "minimum to second order",
        f"no eigenvalue is negative beyond the tolerance{sure}; some count as zero, where terms of higher order decide",
    )


def _escape(objective: Objective, u: Tensor, slope: float, curvature: float, plan: CriticalPlan) -> EscapeLine:
    theta = objective.space.current()
    reach = plan.reach or 0.1 * float(theta.norm()) or 1.0
    half = plan.num_points // 2
    steps = torch.linspace(-1, 1, 2 * half + 1, dtype=torch.float64) * reach
    steps[half] = 0.0
    losses = [loss_at(objective, theta + t * u.to(theta)).value for t in steps.tolist()]
    return EscapeLine(steps=steps, losses=torch.tensor(losses, dtype=torch.float64), slope=slope, curvature=curvature)
