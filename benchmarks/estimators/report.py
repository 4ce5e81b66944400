"""The table of `bench_estimators`: a block a quantity, a line an estimator, a column a network and a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import conditions, marked

__all__ = ["estimator_table"]

TITLES = {
    "trace": "trace of the Hessian",
    "diagonal": "diagonal of the Hessian",
    "pairs": "5 outer eigenvalues of the Hessian",
    "ggn-pairs": "5 outer eigenvalues, Gauss-Newton",
}
Row = dict[str, Any]


def estimator_table(rows: Sequence[Row]) -> str:
    """Return the Markdown for all rows: a cell is the error, bold the least of each column, and the seconds."""
    footnotes: list[str] = []
    lines: list[str] = []
    for quantity, title in TITLES.items():
        chosen = [row for row in rows if row["quantity"] == quantity]
        if not chosen:
            continue
        columns = list(dict.fromkeys((row["problem"], row["budget"]) for row in chosen))
        lines += [f"| {title} | " + " | ".join(f"{p}, {m} products" for p, m in columns) + " |"]
        lines += ["|---|" + "--:|" * len(columns)]
        for method in dict.fromkeys(row["method"] for row in chosen):
            found = {(row["problem"], row["budget"]): row for row in chosen if row["method"] == method}
            label = next(iter(found.values()))["label"]
            label = f"**torch-curvature**, {label}" if next(iter(found.values()))["ours"] else label
            cells = [_cell(found[c], _least(chosen, c), footnotes) if c in found else "" for c in columns]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += _accuracy([row for row in rows if row["quantity"] == "trace to 1 %"])
    lines += [f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]
    lines += [""] if footnotes else []
    return "\n".join([*lines, _conditions(rows)]) + "\n"


def _least(rows: Sequence[Row], column: tuple[str, int]) -> str:
    errors = [r["error"] for r in rows if (r["problem"], r["budget"]) == column and not r["failure"]]
    return _percent(min(errors)) if errors else ""


def _cell(row: Row, least: str, footnotes: list[str]) -> str:
    if row["failure"]:
        return f"fails{marked('`' + row['failure'] + '`', footnotes)}"
    error = _percent(row["error"])
    spent = "" if row["products"] == row["budget"] else f", {row['products']:.0f} products"
    return f"{f'**{error}**' if error == least else error} ({row['seconds']:.2g} s{spent})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _accuracy(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| trace of the Hessian to 1 % | products | error |", "|---|--:|--:|"]
    lines += [f"| {r['problem']}, {r['label']} | {r['products']:.0f} | {_percent(r['error'])} |" for r in rows]
    return [*lines, ""]


def _conditions(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if not row["failure"]]
    if not measured:
        return "Nothing was measured."
    seeds = {row["problem"]: row["seeds"] for row in measured if row["quantity"] in TITLES}
    said = ", ".join(f"{count} for {problem}" for problem, count in seeds.items())
    return (
        "Error relative to the exact value, root mean square over seeds (" + said + "); of diagonals in norm, of "
        "eigenvalues the largest of five. In brackets CPU seconds, and the products where they are not those allowed. "
        f"{conditions(measured)}"
    )
