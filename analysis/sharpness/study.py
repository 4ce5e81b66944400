"""`curvature sharpness`: sharpness measures and their invariances."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from analysis.records.measured import Measured
from analysis.run.cores import one_core_each
from analysis.run.study import Part, Study, StudyRun, Work
from analysis.sharpness.catalogue import MEASURES
from analysis.sharpness.figures import plot_sharpness
from analysis.sharpness.measure import SharpnessPlan, measure_sharpness, measures_for, work_of
from analysis.sharpness.results import SharpnessRow, SharpnessTable
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.environment.cost import median_seconds
from curvature.objective.objective import Objective

__all__ = ["STUDY", "SharpnessRun"]

_CARDS = {
    "top_eigenvalue": "largest eigenvalue λ of the Hessian",
    "trace": "sum of its eigenvalues",
    "adaptive_top_eigenvalue": "the same, in relative changes of the parameters",
    "adaptive_worst_linf": "rise of the loss within relative changes",
    "adaptive_average": "mean rise under relative noise",
    "m_sharpness": "one-step rise over pieces of the data (SAM)",
    "adaptive_pac_bayes": "1/σ² of the relative noise that the loss tolerates",
    "relative_flatness": "layer by layer, of weights and curvature",
}
"""Measures that the report opens with, where they were asked for."""
_SAMPLE = 4  # pieces that are timed


@dataclass(frozen=True, kw_only=True, repr=False)
class SharpnessRun(StudyRun):
    """One table of sharpness, with what produced it."""

    kind: ClassVar[str] = "sharpness"
    result: ClassVar[str] = "sharpness"

    sharpness: SharpnessTable
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.sharpness)


def _price(objective: Objective, plan: SharpnessPlan) -> Work:
    names = measures_for(objective, plan.measures)
    total: Counter[str] = Counter()
    for name in names:
        total.update(work_of(name, objective, plan))
    parts = list[Part]()
    if by_pieces := sum("m_sharpness" in name for name in names):
        pieces, seconds = _timed_pieces(objective, plan)
        parts.append(Part(by_pieces * pieces, "pieces of the data", seconds, gradients=3))
    with one_core_each(objective) as workers:
        return Work(**total, parts=tuple(parts), workers=min(workers, len(names)))


def _timed_pieces(objective: Objective, s: SharpnessPlan) -> tuple[int, float]:
    """Return how many pieces a measure cuts the data into, and the seconds that each takes, from a few of them."""
    cut = objective.split(s.piece)
    sample = list(itertools.islice(cut.batches(), _SAMPLE))
    some = objective.replace(data=sample)
    generator = torch.Generator(objective.device).manual_seed(0)
    MEASURES["m_sharpness"].compute(some, s, generator)  # the first is slower
    seconds = median_seconds(lambda: MEASURES["m_sharpness"].compute(some, s, generator), objective.device)
    return sum(1 for _ in cut.batches()), seconds / len(sample)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(table: SharpnessTable) -> Report:
    return Report(
        title="Sharpness",
        facts=(f"loss {wording.number(table.loss)}",),
        cards=tuple(_card(table[name], hint) for name, hint in _CARDS.items() if _has(table, name)),
        findings=_findings(table),
        sections=(
            *_chapters("Measures invariant under rescaling of layers", table, invariant=True),
            *_chapters("Measures that change under rescaling of layers", table, invariant=False),
            _definitions(table),
        ),
        terms=_TERMS,
        method=(
            "Each measure drew from a random stream of its own, so that its value does not depend on which others were "
            "asked for. Products are exact (double backward); no data were left out."
        ),
        notes=(
            *_left_out(table),
            "No measure ranks models across settings: Andriushchenko et al. (2023) find rank correlations with test "
            "error of either sign, which follow the learning rate. Compare like with like, the invariant ones first.",
        ),
    )


def _left_out(table: SharpnessTable) -> tuple[str, ...]:
    names = ", ".join(name.replace("_", " ") for name in table.left_out)
    return (f"Not measured, since this loss, model or data do not allow it: {names}.",) if names else ()


def _has(table: SharpnessTable, name: str) -> bool:
    return any(row.name == name for row in table.rows)


def _card(row: SharpnessRow, hint: str) -> Card:
    value, error = wording.value_and_error(_measured(row))
    if row.kind == "lower bound":
        value, error = f"≥ {wording.number(row.value, 3)}", "lower bound"
    label = row.label[:1].upper() + row.label[1:] if row.label[1:2] != "-" else row.label
    return Card(label=label, value=value, error=error, hint=f"{hint}; {_unit(row)}")


def _unit(row: SharpnessRow) -> str:
    return "a pure number" if row.unit == "1" else row.unit.replace("^2", "²").replace("percent", "per cent")


def _measured(row: SharpnessRow) -> Measured:
    return Measured(value=row.value, stderr=row.stderr if math.isfinite(row.stderr) else 0.0)


def _findings(table: SharpnessTable) -> tuple[Finding, ...]:
    found = []
    if _has(table, "top_eigenvalue"):
        top = table["top_eigenvalue"]
        text = f"The largest curvature is λ = {wording.quantity(_measured(top))}"
        if _has(table, "trace") and table["trace"].value > 0:
            mean = table["trace"].value / table.num_params
            text += f", {wording.number(top.value / mean, 3)} times the average over all directions"
        found.append(Finding("How sharp is it in absolute terms?", text + "."))
    if _has(table, "adaptive_top_eigenvalue") and _has(table, "top_eigenvalue"):
        row = table["adaptive_top_eigenvalue"]
        rise = wording.number(0.5e-4 * row.value * table.num_params, 2)
        text = (
            "With respect to relative changes of the parameters, the largest curvature is "
            f"{wording.quantity(_measured(row))}: changing every parameter by 1{wording.THIN}%, in any pattern, "
            f"raises the loss by at most {rise} to second order."
        )
        found.append(Finding("How sharp is it relative to the weights?", text))
    if _has(table, "adaptive_pac_bayes"):
        sigma = table["adaptive_pac_bayes"].value ** -0.5 if table["adaptive_pac_bayes"].value > 0 else math.inf
        text = (
            f"Relative noise of {wording.number(100 * sigma, 2)}{wording.THIN}% on every parameter raises it by "
            f"{SharpnessPlan.rise:g}."
        )
        found.append(Finding("How much noise does the loss tolerate?", text))
    bounds = [row for row in table.rows if row.kind == "lower bound"]
    if bounds:
        text = (
            f"{len(bounds)} of {len(table.rows)} measures are worst cases found by gradient ascent: the true maximum "
            "may be higher."
        )
        found.append(Finding("What is only a lower bound?", text))
    return tuple(found)


def _chapters(title: str, table: SharpnessTable, *, invariant: bool) -> tuple[Section, ...]:
    rows = tuple(row for row in table.rows if row.rescaling_invariant == invariant)
    if not rows:
        return ()
    part = SharpnessTable(rows=rows, loss=table.loss, num_params=table.num_params)
    name = "invariant" if invariant else "variant"
    what = "do not move" if invariant else "move"
    section = Section(
        title=title,
        figures=(
            Figure(
                name=f"sharpness-{name}",
                label="The measures on a logarithmic axis; the table below has the numbers.",
                caption=f"Measures that {what} when the weights of one layer of a ReLU network are multiplied by a "
                "and those of the next divided by a, which changes no output. Each has its own unit: compare "
                "it with the same measure of another model only.",
                draw=partial(_draw, part),
                height=1.4 + 0.27 * len(rows),
            ),
        ),
        tables=(
            Table(
                caption="Values with one standard error (of an eigenvalue: its residual); worst cases are lower "
                "bounds. “Scales”: rescalings that do not change the measure, of whole layers or of every "
                "unit. Cost in passes over the data.",
                columns=("measure", "value", "unit", "scales", "products", "gradients", "losses", "time"),
                rows=tuple(_cells(row) for row in rows),
            ),
        ),
    )
    return (section,)


def _draw(part: SharpnessTable, ax: object, colors: object) -> object:
    return plot_sharpness(part, ax=ax, colors=colors)  # type: ignore[arg-type]  # of this study


def _cells(row: SharpnessRow) -> tuple[str, ...]:
    value = f"≥ {wording.number(row.value, 3)}" if row.kind == "lower bound" else wording.quantity(_measured(row))
    spent = (row.num_matvecs, row.num_gradients, row.num_losses)
    costs = (wording.count(n) if n else "" for n in spent)
    unit = "" if row.unit == "1" else _unit(row)
    free = "units" if row.unit_invariant else "layers" if row.rescaling_invariant else ""
    return (row.label, value, unit, free, *costs, wording.duration(row.seconds))


def _definitions(table: SharpnessTable) -> Section:
    rows = tuple((row.label, row.formula, row.source) for row in table.rows)
    sources = Table(
        caption="What was computed, and who defined it.",
        columns=("measure", "formula", "source"),
        rows=rows,
        num_prose=2,
        on_screen=False,
    )
    return Section(title="Definitions", tables=(sources,))


_TERMS = (
    (
        "Rescaling",
        "Multiplying the weights and biases of one layer of a ReLU network by a and dividing the next one's weights "
        "by a changes no output, but changes most sharpness measures arbitrarily (Dinh et al. 2017). Measures "
        "relative to layers, filters or parameters are invariant. If every unit has a factor of its own, only those "
        "relative to single parameters are invariant (“units” in the column).",
    ),
    (
        "Worst case",
        "The largest rise of the loss within a ball, by projected gradient ascent from several starts: a lower bound.",
    ),
    ("Average case", "The mean rise under normal noise, in pairs of opposite sign, with its standard error."),
    (
        "PAC-Bayes",
        f"1/σ² of the largest noise under which the loss rises by no more than {SharpnessPlan.rise:g} on average.",
    ),
    ("± (uncertainty)", "One standard error over probes or pieces of the data; of an eigenvalue, its residual."),
)


STUDY = Study(record=SharpnessRun, plan=SharpnessPlan, measure=measure_sharpness, price=_price)
