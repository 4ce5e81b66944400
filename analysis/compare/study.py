"""`curvature compare`: runs of one kind side by side, and which differences are real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from analysis.compare.figures import plot_comparison
from analysis.compare.measure import compare_results
from analysis.compare.results import Compared, Comparison
from analysis.records.measured import Measured
from analysis.run.record import now, versions
from analysis.run.study import StudyRun
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.errors import InputError

__all__ = ["ComparisonRun", "compare_runs"]

_MOST_CARDS = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class ComparisonRun(StudyRun):
    """A comparison, with the runs that were compared."""

    kind: ClassVar[str] = "comparison"
    result: ClassVar[str] = "comparison"

    comparison: Comparison
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.comparison)


def compare_runs(
    runs: Sequence[StudyRun], folders: Sequence[Path], *, level: float = 0.05, command: str = ""
) -> ComparisonRun:
    """Compare runs of one kind number by number; the first is what the others are compared with.

    Args:
        runs: as `load_record` reads them.
        folders: where they lie; the last parts that tell them apart name them.
        level: family-wise error level.
        command: the command line this came from, for the record.

    Raises:
        InputError: for fewer than two runs, runs of several kinds, or runs whose numbers cannot be compared.
    """
    kinds = {run.kind for run in runs}
    if len(kinds) > 1:
        raise InputError(f"runs must be of one kind, got {', '.join(sorted(kinds))}; compare like with like.")
    names = _names([folder.absolute() for folder in folders])
    digests = {run.data_sha256 for run in runs}
    same = None if None in digests else len(digests) == 1
    results = {name: getattr(run, run.result) for name, run in zip(names, runs, strict=True)}
    found = compare_results(results, level=level, same_data=same)
    first = runs[0]
    return ComparisonRun(
        task=", ".join(str(folder) for folder in folders),
        name=" against ".join((names[-1], names[0])) if len(names) == 2 else f"{names[0]} and {len(names) - 1} others",
        description=f"{len(names)} runs of the kind {first.kind!r}: {', '.join(names)}.",
        metadata={name: f"{run.task}, seed {run.seed}, {run.created}" for name, run in zip(names, runs, strict=True)},
        settings={"level": level},
        seed=first.seed,
        command=command,
        created=now(),
        versions=versions(),
        checkpoint=None,
        data_sha256=first.data_sha256 if same else None,
        check=None,
        num_params=first.num_params,
        total_weight=float(first.total_weight),
        dtype=first.dtype,
        device=first.device,
        cost=None,
        comparison=found,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest trailing parts of paths that tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise InputError("the same run was given twice; give different ones.")


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: Comparison) -> Report:
    sections = [_numbers(found)]
    sections += [_ratios(found, model) for model in range(1, len(found.names))]
    if found.overlaps is not None:
        sections.append(_overlaps(found))
    return Report(
        title="Comparison",
        facts=(f"{len(found.names)} models",),
        cards=_cards(found),
        findings=_findings(found),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            f"Differences to {found.names[0]}, divided by the root of the sum of squared errors, under Student's "
            "distribution with Welch's degrees of freedom. Verdicts hold together at a level of "
            f"{wording.number(100 * found.level, 2)}{wording.THIN}% (Holm's procedure over "
            f"{len(found.rows) * (len(found.names) - 1)} differences)."
        ),
        notes=(*found.notes, *_note_on_data(found)),
    )


def _note_on_data(found: Comparison) -> tuple[str, ...]:
    if found.same_data is None:
        return ("Whether all were measured on the same data is not known: data from loaders have no digest.",)
    if found.same_data:
        return (
            "All were measured on the same data. Their errors over data are correlated but were treated as "
            "independent: “real” is conservative.",
        )
    return ("They were measured on different data: differences of the models and of the data are mixed.",)


def _cards(found: Comparison) -> tuple[Card, ...]:
    told = [row for row in found.rows if any(v in ("real", "on these data") for v in row.verdicts)]
    rows = sorted(told, key=lambda row: "real" not in row.verdicts)[:_MOST_CARDS] or list(found.rows[:4])
    return tuple(_card(row, found) for row in rows)


def _card(row: Compared, found: Comparison) -> Card:
    last = len(found.names) - 1
    ratio = row.ratios[last]
    value = f"{wording.TIMES} {wording.number(ratio, 3)}" if math.isfinite(ratio) else "sign changes"
    hint = f"{wording.number(row.values[0].value, 3)} to {wording.number(row.values[last].value, 3)}"
    return Card(label=row.name, value=value, error=row.verdicts[last - 1], hint=hint)


def _findings(found: Comparison) -> tuple[Finding, ...]:
    answers = []
    for place, name in enumerate(found.names[1:], start=1):
        by: dict[str, list[str]] = {}
        for row in found.rows:
            by.setdefault(row.verdicts[place - 1], []).append(_change(row, place))
        text = []
        if "real" in by:
            text.append(f"Beyond the effect of other data: {'; '.join(by['real'])}.")
        if "on these data" in by:
            text.append(f"On these data only, possibly due to the sample: {'; '.join(by['on these data'])}.")
        equal, unknown = len(by.get("not told apart", [])), len(by.get("unknown", []))
        text.append(f"{equal} numbers are not told apart." if text else f"None of {equal} numbers can be told apart.")
        if unknown:
            text.append(f"{unknown} have no known error.")
        answers.append(Finding(f"How does {name} differ from {found.names[0]}?", " ".join(text)))
    return tuple(answers)


def _change(row: Compared, place: int) -> str:
    first, other = row.values[0].value, row.values[place].value
    direction = "higher" if other > first else "lower"
    ratio = row.ratios[place]
    by = f" ({wording.TIMES} {wording.number(ratio, 3)})" if math.isfinite(ratio) else ""
    return f"{row.name} {direction}{by}"


def _numbers(found: Comparison) -> Section:
    columns = ["number", *found.names]
    for name in found.names[1:]:
        columns += ["ratio", "p", f"{name}" if len(found.names) > 2 else "verdict"]
    rows = []
    for row in found.rows:
        cells = [row.name, *(_value(m) for m in row.values)]
        for place, verdict in enumerate(row.verdicts, start=1):
            cells.append(wording.number(row.ratios[place], 3) if math.isfinite(row.ratios[place]) else "")
            cells += [_p(row, place), verdict]
        rows.append(tuple(cells))
    caption = (
        "Numbers with one standard error of the solver and, after the semicolon, over other data of the same size "
        "where it is known; p-values of the differences before the correction for their number."
    )
    return Section(title="Number by number", tables=(Table(caption=caption, columns=tuple(columns), rows=tuple(rows)),))


def _value(measured: Measured) -> str:
    if math.isnan(measured.value):
        return ""
    stderr = measured.stderr if math.isfinite(measured.stderr) else 0.0
    text = wording.quantity(Measured(value=measured.value, stderr=stderr), 3)
    over = wording.over_data(measured)
    return f"{text}; {over}" if over else text


def _p(row: Compared, place: int) -> str:
    over_data, solver = row.p_data[place - 1], row.p_solver[place - 1]
    value = solver if math.isnan(over_data) else over_data
    if math.isnan(value):
        return ""
    return "< 10⁻⁶" if value < 1e-6 else wording.number(value, 2)


def _ratios(found: Comparison, model: int) -> Section:
    num_rows = sum(math.isfinite(row.ratios[model]) for row in found.rows)
    return Section(
        title=f"{found.names[model]} over {found.names[0]}",
        figures=(
            Figure(
                name=f"ratios-{model}",
                label=f"Ratios of the numbers of {found.names[model]} to those of {found.names[0]}, on a logarithmic "
                "axis.",
                caption="Ratios with one standard error: thick bars for the solver alone, thin ones including other "
                "data. Numbers that change sign have no ratio.",
                draw=partial(_draw, found, model),
                height=1.3 + 0.24 * num_rows,
            ),
        ),
    )


def _draw(found: Comparison, model: int, ax: Any, colors: Any) -> object:
    return plot_comparison(found, model=model, ax=ax, colors=colors)


def _overlaps(found: Comparison) -> Section:
    assert found.overlaps is not None
    rows = tuple(
        (name, *(wording.number(v, 2) for v in row))
        for name, row in zip(found.names, found.overlaps.tolist(), strict=True)
    )
    table = Table(
        caption="Overlap of the spaces that the largest eigenvectors span, |U'V|²/k: 1 for the same space, about k/n "
        "for unrelated ones. It is meaningful for checkpoints of one run.",
        columns=("", *found.names),
        rows=rows,
    )
    return Section(title="Do the sharpest directions stay?", tables=(table,))


_TERMS = (
    (
        "Real",
        "The difference exceeds what probes, quadrature and another sample of the same size would cause.",
    ),
    (
        "On these data",
        "It exceeds the solver's errors, but other data of the same size may reverse it, or their effect is unknown.",
    ),
    ("Not told apart", "The solver's errors alone could explain the difference."),
    ("Unknown", "The error of one of the numbers is not known: it is a lower bound, or was read off a grid."),
)
