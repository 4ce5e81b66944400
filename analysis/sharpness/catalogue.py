"""The catalogue of measures of sharpness: what each computes, who defined it, and what it is invariant to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from analysis.records.plan import Plan, setting
from analysis.sharpness.ascent import Ball, ScaleKind, perturbation_scale, worst_case
from analysis.sharpness.computations import (
    Found,
    average_rise,
    box_rise,
    diagonally_scaled,
    fisher_rao,
    logit_normalised,
    pieces,
    relative_flatness,
    tolerated_noise,
)
from analysis.sharpness.results import Kind
from curvature.arguments import checked_fields
from curvature.linalg import eigsh, frobenius_norm, trace
from curvature.objective.objective import Objective
from curvature.objective.shift import gradient_at, loss_at, rows_at_once
from curvature.operators.ggn import GGNOperator
from curvature.operators.hessian import HessianOperator
from curvature.results.estimates import Estimate, mean_and_stderr, stderr_of_weighted_mean
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["MEASURES", "Measure", "SharpnessPlan"]


@checked_fields
@dataclass(frozen=True, kw_only=True)
class SharpnessPlan(Plan):
    """Which measures to take, and the sizes and budgets that they share."""

    measures: tuple[str, ...] | None = setting(
        None, "Only this measure; may be given several times.", flag="--measure NAME"
    )
    rho: float = setting(
        0.05, "Length of a perturbation; for linf the cube inside that ball, for averages the rms length.", above=0
    )
    adaptive_rho: float = setting(0.5, "The same for perturbations relative to the parameters.", above=0)
    num_steps: int = setting(20, "Most gradients of an ascent, for each start.", least=1)
    num_restarts: int = setting(2, "Starts of an ascent.", least=1)
    ascent_rtol: float = setting(
        1e-3, "An ascent ends after two steps in a row that add less than this share of the rise.", above=0
    )
    num_probes: int = setting(16, "Antithetic pairs of noise for averages.", least=2)
    num_matvecs: int = setting(32, "Products for a trace, a norm, or each layer's relative flatness.", least=4)
    rtol: float = setting(1e-3, "Relative residual of eigenvalues.", above=0)
    piece: int = setting(32, "Examples per piece, the m of m-sharpness.", least=1)
    rise: float = setting(0.1, "Mean rise of the loss that the PAC-Bayes search allows.", above=0)
    epsilon: float = setting(1e-3, "Size of Keskar's box.", above=0)
    box_iterations: int = setting(10, "Iterations of L-BFGS-B in that box.", least=1)
    damping: float = setting(1e-3, "Prior precision of the local volume, per loss term.", above=0)


def _scaled(objective: Objective, settings: SharpnessPlan, scale: ScaleKind) -> tuple[Tensor, float]:
    return perturbation_scale(objective, scale), settings.rho if scale == "raw" else settings.adaptive_rho


def _top(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    A = diagonally_scaled(HessianOperator(objective), perturbation_scale(objective, scale))
    pairs = eigsh(A if scale != "raw" else objective, 1, rtol=s.rtol, generator=g)
    value, residual = float(pairs.eigenvalues[0]), float(pairs.residual_norms[0])
    return Found(value=value, stderr=residual, num_matvecs=pairs.num_matvecs)


def _found(estimate: Estimate) -> Found:
    return Found(
        value=float(estimate.value),
        stderr=float(estimate.stderr),
        dof=estimate.dof,
        skewness=float(estimate.skewness),
        num_matvecs=estimate.num_matvecs,
    )


def _trace(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    A = diagonally_scaled(HessianOperator(objective), perturbation_scale(objective, scale))
    return _found(trace(A, num_matvecs=s.num_matvecs, generator=g))


def _frobenius(objective: Objective, s: SharpnessPlan, g: torch.Generator) -> Found:
    return _found(frobenius_norm(HessianOperator(objective), num_matvecs=s.num_matvecs, generator=g))


def _one_step(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    """Rise at the point that a training step of SAM or ASAM looks at; 0 where the gradient is 0."""
    c, rho = _scaled(objective, s, scale)
    theta = objective.space.current()
    at_once = rows_at_once(objective)
    base, gradient = gradient_at(objective, theta, at_once=at_once)
    h = c * gradient
    if not bool(h.any()):
        return Found(value=0.0, stderr=0.0, num_gradients=1, details={"rho": rho})
    there = loss_at(objective, theta + rho * c * h / h.norm(), at_once=at_once).value
    return Found(value=there - base, stderr=0.0, num_gradients=1, num_losses=1, details={"rho": rho})


def _worst(
    objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw", ball: Ball = "l2"
) -> Found:
    c, rho = _scaled(objective, s, scale)
    radius = rho if ball == "l2" else rho / objective.num_params**0.5
    found = worst_case(
        objective,
        rho=radius,
        ball=ball,
        scale=c,
        num_steps=s.num_steps,
        num_restarts=s.num_restarts,
        rtol=s.ascent_rtol,
        generator=g,
    )
    starts = {f"start {i}": rise for i, rise in enumerate(found.rises)}
    details = {"rho": radius, **starts}
    return Found(value=found.rise, stderr=math.nan, num_gradients=found.num_gradients, details=details)


def _average(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    c, rho = _scaled(objective, s, scale)
    return average_rise(objective, c, rho=rho, num_probes=s.num_probes, generator=g)


def _normalised(
    objective: Objective, s: SharpnessPlan, g: torch.Generator, of: Callable[..., Found], **how: str
) -> Found:
    return of(logit_normalised(objective), s, g, **how)


def _in_pieces(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    """The mean of the one-step rise over pieces of m examples, each moved along its own gradient."""
    parts = pieces(objective, s.piece)
    found = [_one_step(part, s, g, scale) for part in parts]
    rises = torch.tensor([f.value for f in found], dtype=torch.float64)
    weights = torch.tensor([part.total_weight for part in parts], dtype=torch.float64)
    p = weights / weights.sum()
    value = float(rises.sum() if objective.is_sum else (p * rises).sum())
    if len(parts) == 1:
        stderr = math.nan
    elif objective.is_sum:
        stderr = len(parts) * float(mean_and_stderr(rises)[1])
    else:
        stderr = float(stderr_of_weighted_mean(rises, p))
    rho = s.rho if scale == "raw" else s.adaptive_rho
    details = {"rho": rho, "m": float(s.piece), "pieces": float(len(parts))}
    return Found(value=value, stderr=stderr, dof=len(parts) - 1.0, num_gradients=1, num_losses=1, details=details)


def _tolerance(objective: Objective, s: SharpnessPlan, g: torch.Generator, scale: ScaleKind = "raw") -> Found:
    c = perturbation_scale(objective, scale)
    return tolerated_noise(objective, c, rise=s.rise, num_probes=s.num_probes, generator=g)


def _flatness(objective: Objective, s: SharpnessPlan, g: torch.Generator) -> Found:
    return relative_flatness(objective, num_matvecs=s.num_matvecs, generator=g)


def _fisher_rao(objective: Objective, s: SharpnessPlan, g: torch.Generator) -> Found:
    return fisher_rao(objective)


def _box(objective: Objective, s: SharpnessPlan, g: torch.Generator) -> Found:
    return box_rise(
        objective, epsilon=s.epsilon, max_iterations=s.box_iterations, num_restarts=s.num_restarts, generator=g
    )


def _volume(objective: Objective, s: SharpnessPlan, g: torch.Generator) -> Found:
    plan = SpectrumPlan(k=0, num_bottom=0, num_groups=0, num_probes=6, num_steps=12)
    found = spectrum(GGNOperator(objective), plan, generator=g)
    log = found.spectral_sum(lambda x: 0.5 * torch.log1p(x.clamp_min(0) / s.damping))
    stderr, dof = log.error
    details = {"damping": s.damping}
    return Found(
        value=float(log.value),
        stderr=stderr,
        dof=dof,
        skewness=float(log.skewness),
        num_matvecs=found.num_matvecs,
        details=details,
    )


Invariance = Literal["layers", "units"]
"""Of what the scales do not matter: of whole layers, or of every single unit."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How to compute a measure, and how its row describes it."""

    compute: Callable[[Objective, SharpnessPlan, torch.Generator], Found]
    formula: str
    source: str
    invariant: Invariance | None
    unit: str = "loss"
    kind: Kind = "estimate"  # where it is not exact
    needs_split: bool = False
    needs_likelihood: bool = False
    needs_outputs: bool = False
    """Is of a loss that depends on the parameters through the outputs alone."""


_CURVATURE = "loss / parameter^2"
_ANDRIUSHCHENKO = "Andriushchenko et al. (2023), arXiv 2302.07011"
_SAM = "Foret et al. (2021), arXiv 2010.01412"
_ASAM = "Kwon et al. (2021), arXiv 2102.11600, whose code adds 0.01 to |theta| and leaves biases unscaled"
_JIANG = "Jiang et al. (2020), arXiv 1912.02178, who bound the rise of the error rate by 0.1"
_DINH = "Dinh et al. (2017), arXiv 1703.04933, who show how rescaling moves it"
_NEYSHABUR = "Neyshabur et al. (2017), arXiv 1706.08947"
_IN_BALL = "max L(theta + c u) - L(theta), {ball}, c = {scale}"
_BALLS = {"l2": "|u|_2 <= rho", "linf": "|u_i| <= rho / n^(1/2)"}
_WORST_SOURCES: dict[ScaleKind, str] = {
    "raw": _SAM,
    "elementwise": _ASAM,
    "filter": f"{_ASAM}, for convolutions, with the 2-norm of the filter",
    "layer": f"after {_ASAM}",
}
_AVERAGE_SOURCES: dict[ScaleKind, str] = {
    "raw": _NEYSHABUR,
    "elementwise": _ANDRIUSHCHENKO,
    "filter": f"after {_ANDRIUSHCHENKO}",
    "layer": f"after {_ANDRIUSHCHENKO}",
}
_INVARIANT: dict[ScaleKind, Invariance | None] = {
    "raw": None,
    "elementwise": "units",
    "filter": "layers",
    "layer": "layers",
}
_SCALES = {"raw": "1", "elementwise": "|theta|", "filter": "rms of the filter", "layer": "rms of the tensor"}


def _worst_spec(scale: ScaleKind, ball: Ball) -> Measure:
    return Measure(
        compute=partial(_worst, scale=scale, ball=ball),
        formula=_IN_BALL.format(ball=_BALLS[ball], scale=_SCALES[scale]),
        source=_WORST_SOURCES[scale],
        invariant=_INVARIANT[scale],
        kind="lower bound",
    )


def _average_spec(scale: ScaleKind) -> Measure:
    return Measure(
        compute=partial(_average, scale=scale),
        formula=f"E L(theta + c u) - L(theta), u normal with E|u|^2 = rho^2, c = {_SCALES[scale]}",
        source=_AVERAGE_SOURCES[scale],
        invariant=_INVARIANT[scale],
    )


MEASURES: dict[str, Measure] = {
    "top_eigenvalue": Measure(
        compute=_top,
        formula="lambda_max(H)",
        source="Cohen et al. (2021), arXiv 2103.00065",
        invariant=None,
        unit=_CURVATURE,
        kind="residual",
    ),
    "trace": Measure(compute=_trace, formula="tr H", source=_DINH, invariant=None, unit=_CURVATURE),
    "frobenius_norm": Measure(
        compute=_frobenius,
        formula="(sum_ij H_ij^2)^(1/2)",
        source="Wu, Zhu and E (2017), arXiv 1706.10239",
        invariant=None,
        unit=_CURVATURE,
    ),
    "adaptive_top_eigenvalue": Measure(
        compute=partial(_top, scale="elementwise"),
        formula="lambda_max(C H C), C = diag |theta|: worst case for rho -> 0 is rho^2 / 2 times this at a minimum",
        source=_ANDRIUSHCHENKO,
        invariant="units",
        kind="residual",
    ),
    "adaptive_trace": Measure(
        compute=partial(_trace, scale="elementwise"),
        formula="sum_i theta_i^2 H_ii: the average for rho -> 0 is rho^2 / 2 n times this",
        source=_ANDRIUSHCHENKO,
        invariant="units",
    ),
    "sam": Measure(compute=_one_step, formula="L(theta + rho g / |g|) - L(theta)", source=_SAM, invariant=None),
    "asam": Measure(
        compute=partial(_one_step, scale="elementwise"),
        formula="L(theta + rho C h / |h|) - L(theta), C = diag |theta|, h = C g",
        source=_ASAM,
        invariant="units",
    ),
    "worst_l2": _worst_spec("raw", "l2"),
    "worst_linf": _worst_spec("raw", "linf"),
    "adaptive_worst_l2": _worst_spec("elementwise", "l2"),
    "adaptive_worst_linf": _worst_spec("elementwise", "linf"),
    "filter_worst_l2": _worst_spec("filter", "l2"),
    "layer_worst_l2": _worst_spec("layer", "l2"),
    "average": _average_spec("raw"),
    "adaptive_average": _average_spec("elementwise"),
    "filter_average": _average_spec("filter"),
    "layer_average": _average_spec("layer"),
    "normalised_worst_linf": Measure(
        compute=partial(_normalised, of=_worst, scale="elementwise", ball="linf"),
        formula=_IN_BALL.format(ball=_BALLS["linf"], scale="|theta|") + ", each logit vector centred and normalised",
        source=_ANDRIUSHCHENKO,
        invariant="units",
        kind="lower bound",
        needs_split=True,
    ),
    "normalised_average": Measure(
        compute=partial(_normalised, of=_average, scale="elementwise"),
        formula="E L(theta + c u) - L(theta), c = |theta|, each logit vector centred and normalised",
        source=_ANDRIUSHCHENKO,
        invariant="units",
        needs_split=True,
    ),
    "m_sharpness": Measure(
        compute=_in_pieces,
        formula="mean over pieces of m examples of L_p(theta + rho g_p / |g_p|) - L_p(theta)",
        source=_SAM,
        invariant=None,
    ),
    "adaptive_m_sharpness": Measure(
        compute=partial(_in_pieces, scale="elementwise"),
        formula="the same with C h_p / |h_p|, C = diag |theta|, h_p = C g_p",
        source=_ANDRIUSHCHENKO,
        invariant="units",
    ),
    "pac_bayes": Measure(
        compute=_tolerance,
        formula="1 / sigma^2 with E L(theta + sigma z) - L(theta) = rise, z normal",
        source=_JIANG,
        invariant=None,
        unit="1 / parameter^2",
    ),
    "adaptive_pac_bayes": Measure(
        compute=partial(_tolerance, scale="elementwise"),
        formula="1 / sigma^2 with E L(theta + sigma |theta| z) - L(theta) = rise, z normal",
        source=f"after {_JIANG} and add a constant to |theta|",
        invariant="units",
        unit="1",
    ),
    "relative_flatness": Measure(
        compute=_flatness,
        formula="sum over layers of sum_{s,s'} <w_s, w_s'> tr H_{s,s'}, w_s the weights into unit s",
        source="Petzka et al. (2021), arXiv 2001.00939, who take one layer",
        invariant="layers",
    ),
    "fisher_rao": Measure(
        compute=_fisher_rao,
        formula="theta' F theta, F the Fisher matrix of the model's own distribution",
        source="Liang, Poggio, Rakhlin and Stokes (2019), arXiv 1711.01530",
        invariant="units",
        needs_likelihood=True,
        needs_outputs=True,
    ),
    "keskar": Measure(
        compute=_box,
        formula="100 (max L - L(theta)) / (1 + L(theta)), |y_i| <= epsilon (|theta_i| + 1)",
        source="Keskar et al. (2017), arXiv 1609.04836",
        invariant=None,
        unit="percent",
        kind="lower bound",
    ),
    "log_volume": Measure(
        compute=_volume,
        formula="log det(I + G / damping) / 2, the log of prior over posterior volume; G Gauss-Newton",
        source="MacKay (1992), A practical Bayesian framework for backpropagation networks",
        invariant=None,
        unit="1",
        needs_split=True,
        needs_outputs=True,
    ),
}
