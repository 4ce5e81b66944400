"""From rows to the tables in README and docs: `python -m benchmarks.common.report [NAME ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import conditions, insert, marked, markers
from benchmarks.common.summary_report import summary_table
from benchmarks.coverage.report import coverage_table
from benchmarks.eigen.report import eigen_table
from benchmarks.estimators.report import estimator_table

__all__ = ["BEGIN", "END", "insert", "main", "table"]

ROOT = Path(__file__).parents[2]
BEGIN, END = markers("products")
OPERATORS = {"hessian": "Hessian", "ggn": "Gauss-Newton"}
OURS = ("kept", "kept-16", "rebuilt", "rebuilt-16")
WRONG = 1e-3
"""Relative error in float32 above which a product is called wrong; rounding gives about 1e-6."""

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown for all rows: a table with one line a method and one column a network, and its footnotes.

    A cell is the median cost in gradients of the same batch; bold the cheapest right ones of each column and
    operator, to the digits shown.
    """
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    sizes = {row["problem"]: row["num_params"] for row in rows if "num_params" in row}
    footnotes: list[str] = []
    lines = []
    for operator, title in OPERATORS.items():
        chosen = [row for row in rows if row["operator"] == operator]
        if not chosen:
            continue
        heads = [f"{p.upper()}, {sizes[p] / 1e3:.0f}k" if p in sizes else p.upper() for p in problems]
        lines += [f"| {title} product | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(problems)]
        best = {
            p: min((r["gradients"] for r in chosen if r["problem"] == p and _right(r)), default=None) for p in problems
        }
        for method in dict.fromkeys(row["method"] for row in chosen):
            found = {row["problem"]: row for row in chosen if row["method"] == method}
            label = next(iter(found.values()))["label"]
            label = f"**torch-curvature**, {label}" if method in OURS else label
            cells = [_cell(found[p], best[p], footnotes) if p in found else "" for p in problems]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]
    lines += [""] if footnotes else []
    return "\n".join([*lines, _conditions(rows)]) + "\n"


def _right(row: Row) -> bool:
    return not row.get("failure") and bool(row["error"] <= WRONG)


def _cell(row: Row, best: float | None, footnotes: list[str]) -> str:
    if row.get("failure"):
        return f"fails{marked(_escaped(row['failure']), footnotes)}"
    cost = f"{row['gradients']:.1f}"
    cost = f"**{cost}**" if best is not None and cost == f"{best:.1f}" and _right(row) else cost
    cell = f"{cost} ({row['extra_mebibytes']:+.0f} MiB)"
    if not _right(row):
        percent = 100 * row["error"]
        cell += f", wrong by {percent:.1g} %" if percent < 1 else f", wrong by {percent:.0f} %"
    if ": " in row["attention"]:
        message = row["attention"].split(": ", 1)[1]
        cell += marked(
            f"Under the math kernel for attention, set by the benchmark; else {_escaped(message)}", footnotes
        )
    return cell


def _escaped(message: str) -> str:
    """Return the first sentence of an exception, as code in a table."""
    return "`" + message.split(". ")[0].replace("`", "'").replace("|", "\\|") + "`"


def _conditions(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if not row.get("failure")]
    if not measured:
        return "Nothing was measured."
    worst = max((row["error"] for row in measured if _right(row)), default=0.0)
    return (
        "In gradients of the same batch, median over rounds in which gradient and product alternate; in brackets the "
        "peak memory above that of one gradient; blocks are per column. Every product is compared with double backward "
        f"in float64: all agree to {worst:.0e}, except where the table says wrong. {_looks(measured)}"
        f"{conditions(measured)}"
    )


def _looks(rows: Sequence[Row]) -> str:
    """Say what part of a Hessian product on kept graphs the look at the present point takes."""
    shares = {
        row["problem"]: row["look_share"]
        for row in rows
        if row.get("look_share") is not None and (row["operator"], row["method"]) == ("hessian", "kept")
    }
    if not shares:
        return ""
    said = ", ".join(f"{100 * share:.2g} % ({problem})" for problem, share in shares.items())
    return f"Of a Hessian product on kept graphs the look at the present point takes {said}. "


TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "summary": (summary_table, ("products", "eigen")),
    "products": (table, ("products",)),
    "gpu": (table, ("products_gpu",)),
    "eigen": (eigen_table, ("eigen",)),
    "estimators": (estimator_table, ("estimators",)),
    "coverage": (coverage_table, ("coverage",)),
}
"""How a table is made, and of which files of rows."""


def main() -> None:
    """Renew the tables in every file that has a place for them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.common.report", description=__doc__)
    parser.add_argument(
        "tables", nargs="*", choices=[*TABLES, []], help="by default all that the files have a place for"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parents[1] / "results", help="folder of NAME.json"
    )
    parser.add_argument("--files", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "docs" / "benchmarks.md"])
    a = parser.parse_args()
    for file in a.files:
        text = file.read_text(encoding="utf-8")
        for name in a.tables or TABLES:
            make, sources = TABLES[name]
            if markers(name)[0] in text:
                rows = [json.loads((a.results / f"{source}.json").read_text(encoding="utf-8")) for source in sources]
                text = insert(text, make(*rows), name)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
