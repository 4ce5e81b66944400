"""`curvature noise`: how noisy the gradients of single examples are, and how large a batch is of use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.noise.curvature import curvature_noise
from analysis.noise.figures import plot_batch_sizes, plot_layer_noise
from analysis.noise.measure import gradient_noise
from analysis.noise.results import CurvatureNoise, GradientNoise, NoiseScale
from analysis.records.measured import Measured
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.listener import Progress, stages
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.arguments import checked_fields
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.results.record import Result

__all__ = ["STUDY", "NoisePlan", "NoiseRun", "NoiseStudy", "measure_noise"]

_MOST = 0.9  # of the full gradient's progress: from where on a larger batch gives little


@checked_fields
@dataclass(frozen=True, kw_only=True)
class NoisePlan(Plan):
    """What to measure of the noise."""

    batch_size: int | None = setting(
        None, "Batch size of the training, in examples: also report how much progress its steps make.", least=1
    )
    lr: float | None = setting(None, "Learning rate of plain SGD: also report what one step does.", above=0)
    curvature: bool = setting(True, "Also measure how the noise is aligned with the curvature.")
    num_probes: int = setting(16, "Probes for the alignment with the curvature.", least=2)
    damping: float | None = setting(None, "Also compute the Takeuchi criterion, with this damping.", above=0)
    confidence: float = setting(0.95, "Confidence level of the interval of the noise scale.", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None and not self.curvature:
            raise InputError("the Takeuchi criterion needs curvature; leave out --damping or --no-curvature.")


@dataclass(frozen=True, kw_only=True, repr=False)
class NoiseStudy(Result):
    """What was found about gradient noise at one point."""

    noise: GradientNoise
    """Moments of the gradients of single examples, and what follows for every batch size."""
    curvature: CurvatureNoise | None
    """How the noise lies against the Hessian; None if it was not asked for."""
    batch_size: int | None
    """That of the training, to be judged."""
    lr: float | None
    """Learning rate of the training, to be judged."""


@dataclass(frozen=True, kw_only=True, repr=False)
class NoiseRun(StudyRun):
    """One study of the noise, with what produced it."""

    kind: ClassVar[str] = "noise"
    result: ClassVar[str] = "noise"

    noise: NoiseStudy
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.noise)


def _price(objective: Objective, plan: NoisePlan) -> Work:
    if not plan.curvature:
        return Work(gradients=3.0)
    probes = min(plan.num_probes, objective.num_params)
    solve = 0 if plan.damping is None else 8 * probes  # iterations
    return Work(gradients=7.0, products=2 * probes + 1 + solve)  # with the Hessian and the covariance of the noise


@from_plan(NoisePlan)
def measure_noise(
    objective: Objective, plan: NoisePlan, *, generator: torch.Generator, progress: Progress | None = None
) -> NoiseStudy:
    """Measure the noise of single examples' gradients, and how it lies against curvature."""
    tell = stages(progress, 1 + plan.curvature)
    tell("single examples")
    noise = gradient_noise(objective, confidence=plan.confidence)
    along = None
    if plan.curvature:
        tell("noise against curvature")
        along = curvature_noise(
            objective,
            num_probes=plan.num_probes,
            confidence=plan.confidence,
            damping=plan.damping,
            generator=generator,
        )
    return NoiseStudy(noise=noise, curvature=along, batch_size=plan.batch_size, lr=plan.lr)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(study: NoiseStudy) -> Report:
    noise = study.noise
    return Report(
        title="Gradient noise",
        facts=(f"{wording.count(noise.num_examples)} examples",),
        cards=_cards(study),
        findings=_findings(study),
        sections=(_batches(study), _layers(noise)),
        terms=_terms(study),
        method=(
            "Each example's gradient was used once and not stored: norms come from the activations and errors of "
            "each layer where that is cheaper, inner products with the mean from the same pass or, for several "
            "batches, from one product of the Jacobian. All batch sizes follow from the same sums."
        ),
        notes=noise.notes,
    )


def _cards(study: NoiseStudy) -> tuple[Card, ...]:
    noise, number = study.noise, wording.number
    hint = "batch size at which noise and signal are equal, tr S / |G|²"
    cards = [
        _scale_card("Noise scale", noise.noise_scale, hint),
        Card.of("Noise of one example", noise.trace, "tr S, variance of its gradient"),
        Card.of("Signal", noise.squared_norm, "|G|², squared norm of the mean gradient, unbiased"),
        Card(label="Loss", value=number(noise.loss), hint=f"mean over {wording.count(noise.num_examples)} examples"),
    ]
    if study.curvature is not None:
        c = study.curvature
        hint = "tr(HS) / G'HG: the noise scale weighted by curvature"
        cards.append(_scale_card("Critical batch size", c.noise_scale, hint))
        hint = "tr(HS) over that of isotropic noise; above 1: noise is concentrated in high-curvature directions"
        cards.append(Card(label="Noise anisotropy", value=number(c.anisotropy, 3), hint=hint))
    hint = "inner-product and orthogonality test, θ = 0.9"
    cards.append(Card(label="Batch size by tests", value=_batch(noise.tested_batch_size()), hint=hint))
    hint = "above 0: indistinguishable from sampling noise"
    cards.append(Card(label="Stopping evidence", value=number(noise.evidence, 3), hint=hint))
    if study.batch_size is not None:
        hint = f"of the full gradient's, by a step on {wording.count(study.batch_size)} examples"
        cards.append(Card(label="Progress of a batch", value=_progress(noise, study.batch_size), hint=hint))
    if study.curvature is not None and study.curvature.takeuchi is not None:
        cards.append(Card.of("Takeuchi criterion", study.curvature.takeuchi, "expected gap of test and training loss"))
    return tuple(cards)


def _scale_card(label: str, scale: NoiseScale, hint: str) -> Card:
    """Return a batch size; a bound alone where the signal cannot be told from zero."""
    percent, low = f"{100 * scale.confidence:g}{wording.THIN}%", wording.about(max(scale.lower, 0.0))
    if math.isnan(scale.value):
        return Card(label=label, value="undefined", hint=f"{hint}; the noise is not positive")
    if not math.isfinite(scale.upper):
        error = f"no upper bound ({percent}): the signal cannot be told from zero"
        return Card(label=label, value=f"> {low}", error=error, hint=hint)
    return Card(
        label=label,
        value=wording.about(scale.value),
        error=f"{low} to {wording.about(scale.upper)} ({percent})",
        hint=hint,
    )


def _findings(study: NoiseStudy) -> tuple[Finding, ...]:
    found = [
        Finding("How large a batch is useful?", _useful(study)),
        Finding(
            "Which layers carry the noise?",
            wording.carriers(study.noise.layers, study.noise.layer_traces.tolist(), "the variance"),
        ),
        Finding("Does the gradient exceed its noise?", _evidence(study.noise)),
    ]
    if study.curvature is not None:
        found.append(Finding("Is the noise aligned with the curvature?", _against(study.curvature)))
    if study.lr is not None:
        found.append(Finding("What does one step of SGD do?", _step(study, study.lr)))
    return tuple(found)


def _useful(study: NoiseStudy) -> str:
    noise, scale = study.noise, study.noise.noise_scale
    N, number = noise.effective_examples, wording.number
    if noise.trace.value == 0:
        return "A single example: the gradients of all examples are the same."
    if noise.squared_norm.value <= 0 or not math.isfinite(scale.upper):
        least = f" It is at least {number(scale.lower, 3)}." if scale.lower > 0 else ""
        return (
            f"The mean gradient cannot be told from zero with {wording.count(round(N))} examples: the noise scale has "
            f"no upper bound, so no batch from these data is too large.{least} Training has nearly converged on these "
            "data."
        )
    enough = _MOST / (1 - _MOST) * scale.value
    text = (
        f"Noise and signal are equal at a batch of {_batch(scale.value)} (between {_batch(max(scale.lower, 1.0))} and "
        f"{_batch(scale.upper)}). A step on a batch beyond {_batch(enough)} makes more than "
        f"{100 * _MOST:.0f}{wording.THIN}% of the full gradient's progress: larger batches gain little."
    )
    if study.batch_size is not None:
        text += f" A batch of {wording.count(study.batch_size)} makes {_progress(noise, study.batch_size)} of it."
    return text


def _evidence(noise: GradientNoise) -> str:
    if math.isnan(noise.evidence):
        return "No entry of the gradient has any noise."
    evidence = f"evidence {wording.number(noise.evidence, 3)}"
    if noise.evidence > 0:
        return (
            f"No: entry by entry the mean gradient is no larger than sampling noise alone ({evidence} > 0). Training "
            "on these data may stop."
        )
    if noise.squared_norm.value <= 0:
        return (
            f"Barely: entry by entry the mean gradient is slightly larger than sampling noise alone ({evidence} < 0), "
            "but its norm is not."
        )
    return f"Yes: entry by entry the mean gradient is larger than sampling noise alone ({evidence} < 0)."


def _against(c: CurvatureNoise) -> str:
    if math.isnan(c.cosine):
        return "There is nothing to compare: the noise or the curvature is zero."
    text = (
        f"The cosine between covariance and Hessian is {wording.number(c.cosine, 2)} (1 where they are proportional), "
        f"and tr(HS) is {wording.number(c.anisotropy, 3)} times that of isotropic noise of the same size."
    )
    scale = c.noise_scale
    if math.isfinite(scale.upper) and scale.value > 0:
        between = f"between {_batch(scale.lower)} and {_batch(scale.upper)}"
        text += f" Weighted by curvature, noise and signal are equal at a batch of {_batch(scale.value)} ({between})."
    elif scale.lower > 1:
        text += f" Weighted by curvature, noise and signal are equal at a batch of at least {_batch(scale.lower)}."
    return text


def _step(study: NoiseStudy, lr: float) -> str:
    B = study.batch_size or 1
    of = f"at a learning rate of {lr:g} and batches of {B}"
    text = f"The temperature lr / B is {wording.number(study.noise.temperature(lr, B), 3)} {of}."
    if study.curvature is not None:
        change = study.curvature.expected_change(lr, B)
        best = study.curvature.best_lr(B)
        text += f" To second order a step changes the loss by {wording.number(change, 3)} on average"
        if change > 0:
            text += ": it rises, the noise is larger than the signal"
        text += f"; the step of most progress is {wording.number(best, 3)}." if math.isfinite(best) else "."
    return text


def _batches(study: NoiseStudy) -> Section:
    noise = study.noise
    N = noise.effective_examples
    sizes = sorted({1, 8, 32, 128, 512, round(N), *([study.batch_size] if study.batch_size else [])})
    rows = tuple(
        (
            wording.count(B),
            _progress(noise, B),
            wording.number(noise.norm_test(B), 3),
            wording.number(noise.inner_product_test(B), 3),
            wording.number(noise.orthogonality_test(B), 3),
        )
        for B in sizes
        if max(N, study.batch_size or 0) >= B
    )
    return Section(
        title="Batch sizes",
        figures=(
            Figure(
                name="batch-sizes",
                label="Share of the full gradient's progress that a step makes, against the batch size.",
                caption="Share of the full gradient's progress that a step on B examples makes, 1 / (1 + scale / B), "
                "with the confidence interval of the noise scale. It is one half where B equals the scale.",
                draw=lambda ax, colors: plot_batch_sizes(noise, ax=ax, colors=colors),
            ),
        ),
        tables=(
            Table(
                caption="How well a batch of B examples determines the mean gradient. A batch passes a test if the "
                "number is at most a threshold: usually 0.9 for norm and inner product, 5.84 for "
                "orthogonality.",
                columns=("batch size", "progress", "norm test θ", "inner product θ", "orthogonality ν"),
                rows=rows,
            ),
        ),
    )


def _layers(noise: GradientNoise) -> Section:
    shares = noise.layer_traces / noise.layer_traces.sum()
    columns = (noise.layer_traces, shares, noise.layer_squared_norms, noise.layer_noise_scales, noise.layer_gsnr)
    rows = tuple(
        (
            name,
            wording.number(trace, 3),
            f"{100 * share:.1f}{wording.THIN}%" if math.isfinite(share) else "undefined",
            wording.number(square, 3),
            _batch(scale) if scale > 0 else "noise only",
            wording.number(gsnr, 3),
        )
        for name, trace, share, square, scale, gsnr in zip(noise.layers, *(c.tolist() for c in columns), strict=True)
    )
    return Section(
        title="Layers",
        figures=(
            Figure(
                name="layer-noise",
                label="Noise and signal of each layer on a logarithmic axis; the table below has the numbers.",
                caption="Variance of one example's gradient, and squared mean gradient, layer by layer. Their "
                "distance is the layer's own noise scale. Where the unbiased estimate of the signal is not "
                "positive, it has no mark.",
                draw=lambda ax, colors: plot_layer_noise(noise, ax=ax, colors=colors),
                height=1.2 + 0.26 * len(noise.layers),
            ),
        ),
        tables=(
            Table(
                caption="Noise by layer. “Noise only”: the unbiased estimate of the layer's signal is not positive.",
                columns=("layer", "noise tr S", "share", "signal |G|²", "noise scale", "GSNR"),
                rows=rows,
            ),
        ),
    )


def _progress(noise: GradientNoise, batch_size: float) -> str:
    """Return the share of the full gradient's progress that a batch makes; a bound where the signal is not seen."""
    if noise.squared_norm.value > 0:
        return wording.share(Measured(value=noise.efficiency(batch_size), stderr=0.0))
    most = 1 / (1 + max(noise.noise_scale.lower, 0.0) / batch_size)
    return f"≤ {wording.share(Measured(value=most, stderr=0.0))}"


def _terms(study: NoiseStudy) -> tuple[tuple[str, str], ...]:
    terms = [
        (
            "Noise scale",
            "tr S / |G|²: S is the covariance of single examples' gradients, G their mean over all data one could "
            "draw. Both are estimated without bias; the interval is Fieller's (McCandlish et al. 2018).",
        ),
        (
            "Tests of a batch",
            "How large the relative error of a batch gradient is: as a whole (Byrd et al. 2012), along the mean "
            "gradient and at right angles to it (Bollapragada et al. 2018). They use the gradient of these data.",
        ),
        (
            "Stopping evidence",
            "1 − mean over entries of N g² / S (Mahsereci et al. 2017): positive where the gradient could be noise.",
        ),
        ("GSNR", "Mean over entries of g² / S: signal to noise of single entries (Liu et al. 2020)."),
        (
            "± (uncertainty)",
            "One standard error over other data of the same size; for products with curvature, over probes.",
        ),
    ]
    if study.curvature is not None:
        meaning = (
            "tr(HS) / G'HG: the noise scale with every direction weighted by its curvature. Fieller's interval has "
            "the error of the signal over data and that of the noise over probes; H is taken as that of these data."
        )
        terms.insert(1, ("Critical batch size", meaning))
    return tuple(terms)


def _batch(size: float) -> str:
    """Return a batch size, which is at least 1."""
    return wording.about(max(1.0, size))


STUDY = Study(record=NoiseRun, plan=NoisePlan, measure=measure_noise, price=_price)
