"""What trainings side by side have in common in their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.generalization.contrast.figures import plot_contrast_ratios, plot_fitting
from analysis.generalization.contrast.results import Contrasts
from analysis.records.measured import Bounded, Measured
from analysis.show import wording
from analysis.show.report import Figure, Section, Table

__all__ = ["TERMS", "facts", "points", "sections", "told_ratio"]

THIN = wording.THIN


def facts(found: Contrasts) -> tuple[str, ...]:
    """Return size, data and length in short phrases."""
    count = wording.count
    repeats = len({row.repeat for row in found.rows})
    return (
        f"{count(found.num_params)} parameters, {count(found.num_samples)} training examples",
        f"{found.loss}, {count(repeats)} repeats, {count(found.steps)} steps at most",
    )


def points(measured: Measured) -> str:
    """Return a difference of shares in percentage points."""
    scaled = Measured(value=100 * measured.value, stderr=100 * measured.stderr)
    return wording.quantity(scaled, 2)


def told_ratio(ratio: Bounded) -> str:
    """Return a ratio with its interval; nothing where it is not defined."""
    if not math.isfinite(ratio.value):
        return "undefined"
    number = wording.number
    return f"{number(ratio.value, 2)} ({number(ratio.lower, 2)} to {number(ratio.upper, 2)})"


def sections(found: Contrasts, names: Sequence[tuple[str, str]]) -> tuple[Section, ...]:
    """Return figures and tables: fitting, ratios to the baseline, all numbers."""
    base = found.conditions[0]
    ratios = Table(
        caption=f"Over {base}: geometric means within repeats, with 95 % intervals; test error: difference in points.",
        columns=("condition", *(title for _, title in names), "test error"),
        rows=tuple(
            (
                condition,
                *(told_ratio(found.ratio(name, condition)) for name, _ in names),
                points(found.difference("test_error", condition)),
            )
            for condition in found.conditions[1:]
        ),
    )
    return (
        Section(
            title=f"Against {base}",
            figures=(
                Figure(
                    name="ratios",
                    label=f"Measures of each condition over those of {base}, with intervals.",
                    caption="Geometric means within repeats, 95 % intervals. Left of 1: smaller. Noise: tr S.",
                    draw=lambda ax, colors: plot_contrast_ratios(found, ax=ax, colors=colors),
                    height=0.62 * len(found.conditions) + 1.4,
                    narrow_height=0.7 * len(found.conditions) + 1.6,
                ),
            ),
            tables=(ratios,),
        ),
        Section(
            title="How labels are fitted",
            figures=(
                Figure(
                    name="fitting",
                    label="Training error of each condition along the steps.",
                    caption="Means over repeats; of trainings that ended, their last value.",
                    draw=lambda ax, colors: plot_fitting(found, ax=ax, colors=colors),
                    height=3.2,
                ),
            ),
            tables=(_all(found),),
        ),
    )


def _all(found: Contrasts) -> Table:
    names = (
        ("fit_steps", "steps to fit"),
        ("train_loss", "train loss"),
        ("test_error", "test error"),
        ("test_loss", "test loss"),
        ("norm", "norm"),
        ("sharpness", "sharpness"),
        ("trace", "trace"),
        ("effective_dimension", "eff. dimension"),
        ("noise_scale", "noise scale"),
    )
    rows = tuple((c, *(_cell(found, name, c) for name, _ in names)) for c in found.conditions)
    return Table(
        caption="Means over repeats, with one standard error. Noise scale: median.",
        columns=("condition", *(title for _, title in names)),
        rows=rows,
        on_screen=False,
    )


def _cell(found: Contrasts, name: str, condition: str) -> str:
    own = found.of(name)[found.conditions.index(condition)]
    if name == "noise_scale":
        return wording.number(float(sorted(own)[len(own) // 2]), 2)
    if name == "fit_steps" and not all(map(math.isfinite, own)):
        fitted = sum(map(math.isfinite, own))
        return "never" if fitted == 0 else f"{wording.count(fitted)} of {wording.count(len(own))} fitted"
    return wording.quantity(found.mean(name, condition), 3)


TERMS = (
    ("Sharpness", "Largest eigenvalue of the Hessian of the training loss."),
    ("Trace", "Of the Gauss-Newton matrix of the training loss."),
    ("Effective dimension", "Σ λ / (λ + α), λ of the Gauss-Newton matrix of the loss summed over examples."),
    ("Gradient noise", "tr S, S the covariance of single examples' gradients."),
    ("Noise scale", "tr S / |G|²: the batch size at which noise and gradient are alike."),
)
