"""The table of `bench_eigen`: a block a network, a line a solver, a column a number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import conditions, marked

__all__ = ["eigen_table"]

Row = dict[str, Any]


def eigen_table(rows: Sequence[Row]) -> str:
    """Return the Markdown for all rows: a cell is seconds and products; bold the quickest right one of each column."""
    footnotes: list[str] = []
    lines: list[str] = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        counts = sorted({row["k"] for row in chosen})
        size = next((f", {row['num_params'] / 1e3:.0f}k" for row in chosen if "num_params" in row), "")
        lines += [f"| {problem}{size} | " + " | ".join(f"top {k}" for k in counts) + " |"]
        lines += ["|---|" + "--:|" * len(counts)]
        quick = {k: min((r["seconds"] for r in chosen if r["k"] == k and _right(r)), default=None) for k in counts}
        for method in dict.fromkeys(row["method"] for row in chosen):
            found = {row["k"]: row for row in chosen if row["method"] == method}
            label = next(iter(found.values()))["label"]
            label = f"**torch-curvature**, {label}" if label.startswith("`") else label
            cells = [_cell(found[k], quick[k], footnotes) if k in found else "" for k in counts]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]
    lines += [""] if footnotes else []
    return "\n".join([*lines, _conditions(rows)]) + "\n"


def _right(row: Row) -> bool:
    return not row.get("failure") and bool(row["right"])


def _cell(row: Row, quickest: float | None, footnotes: list[str]) -> str:
    if row.get("failure"):
        return _failure(row["failure"], footnotes)
    seconds = f"{row['seconds']:.1f} s"
    seconds = f"**{seconds}**" if _right(row) and row["seconds"] == quickest else seconds
    cell = f"{seconds} ({row['products']})"
    if not row["right"]:
        cell += f", wrong by {_percent(row['error'])}, "
        cell += {True: "claims to be right", False: "says so", None: "does not say"}[row["converged"]]
    elif row["converged"] is False:
        cell += ", right but says it is not"
    return cell


def _failure(failure: str, footnotes: list[str]) -> str:
    if failure.startswith(("stopped", "not run")):
        return failure
    return f"fails{marked(f'`{failure}`', footnotes)}"


def _percent(error: float) -> str:
    return f"{100 * error:.1g} %" if error < 0.1 else f"{100 * error:.0f} %"


def _conditions(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if not row.get("failure")]
    if not measured:
        return "Nothing was measured."
    exact = max(row["reference_difference"] for row in measured)
    return (
        "Largest eigenvalues of the Hessian, residuals of 1e-3 of the eigenvalue asked for; in brackets the products "
        "spent; seconds include making the operator. Wrong is an eigenvalue off by more than 0.1 % of itself, by a "
        f"reference in float64 on which two solvers agree to {exact:.0e}. {conditions(measured)}"
    )
