"""Sections of a run's report that quantities beyond the usual ones bring."""

from __future__ import annotations

import math

from analysis.show import wording
from analysis.show.report import Figure, Section
from analysis.training.figures_spectrum import plot_depth, plot_smoothness, plot_waterfall
from analysis.training.results import LossSpike, TrainingRecord

__all__ = ["further_sections", "spikes_told"]


_TOLD = 3


def spikes_told(spikes: tuple[LossSpike, ...]) -> str:
    """Return what is known of the highest spikes."""
    count, number = wording.count, wording.number
    parts = []
    for spike in sorted(sorted(spikes, key=lambda s: -s.rise)[:_TOLD], key=lambda s: s.step):
        text = f"at step {count(spike.step)} the loss rose by {number(spike.rise, 2)} to {number(spike.loss, 2)}"
        if spike.warned is None:
            text += ", and the length of the updates gave no warning"
        else:
            text += f", {count(spike.lead or 0)} steps after updates had become unusually long"
        if spike.crossed is not None:
            text += f"; sharpness came above its threshold at step {count(spike.crossed)}"
            if spike.layer:
                text += f", mostly in {spike.layer} ({100 * spike.layer_share:.0f}{wording.THIN}%)"
        else:
            text += "; sharpness was below its threshold"
        parts.append(text)
    begun = f"{count(len(spikes))}: " if len(spikes) > 1 else "One: "
    more = f" The {count(_TOLD)} highest are told." if len(spikes) > _TOLD else ""
    return f"{begun}{'. '.join(part if i == 0 else part[0].upper() + part[1:] for i, part in enumerate(parts))}.{more}"


def further_sections(record: TrainingRecord) -> list[Section]:
    """Return the sections that there are readings for."""
    found = []
    if any(r.ritz_values for r in record.readings):
        figure = Figure(
            name="waterfall",
            label="How many eigenvalues of the Hessian lie where, along the steps.",
            caption="A column a reading, from one Lanczos run of 24 steps and always the same start: lines at the ends "
            "are eigenvalues, the rest is resolved no finer than the spectrum over 24. The axis is linear around zero.",
            draw=lambda ax, colors: plot_waterfall(record, ax=ax, colors=colors),
            height=3.4,
        )
        found.append(Section(title="Spectrum", figures=(figure,)))
    if any(not math.isnan(r.effective_smoothness) for r in record.readings):
        figure = Figure(
            name="smoothness",
            label="Range of the loss, change of the gradient and effective smoothness along the gradient.",
            caption="At steps of 1/2 to 4 times the one that was taken, along the gradient (Santurkar et al. 2018): "
            "the smaller, the better the gradient predicts what is ahead.",
            draw=lambda ax, colors: plot_smoothness(record, ax=ax, colors=colors),
        )
        found.append(Section(title="Smoothness along the gradient", figures=(figure,)))
    if any(r.layer_gradients for r in record.readings):
        figure = Figure(
            name="depth",
            label="Norms of Jacobians and gradients of all layers, at the first and the last reading.",
            caption="Jacobian: of the outputs with respect to what the layer puts out, per row of the outputs. Where "
            "it vanishes or explodes with depth, gradients do.",
            draw=lambda ax, colors: plot_depth(record, ax=ax, colors=colors),
        )
        found.append(Section(title="Depth", figures=(figure,)))
    return found
