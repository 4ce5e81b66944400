"""Tables of the optimizers' benchmark: costs and training for README.md of this folder, checks for docs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_optimizers import at_equal_steps, at_equal_time
from benchmarks.markdown import conditions, insert, marked

__all__ = ["check_page", "cost_table", "training_table", "write_report"]

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def cost_table(rows: Sequence[Row]) -> str:
    """Return the cost of a step in steps of SGD, a line a method and a column a problem."""
    rows = [row for row in rows if row["kind"] == "cost"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    footnotes: list[str] = []
    lines = ["| step, in steps of SGD | " + " | ".join(f"`{p}`" for p in problems) + " |"]
    lines.append("|---|" + "--:|" * len(problems))
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["problem"]: row for row in rows if row["method"] == method}
        cells = []
        for problem in problems:
            row = found.get(problem)
            if row is None:
                cells.append("")
            elif row["failure"]:
                cells.append("fails" + marked(row["failure"], footnotes))
            else:
                cells.append(f"{row['sgd_steps']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})")
        lines.append(f"| {_label(next(iter(found.values())))} | " + " | ".join(cells) + " |")
    lines += ["", *[f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]]
    lines.append(f"Median over rounds that take turns, and quartiles. {conditions(rows)}")
    return "\n".join(lines) + "\n"


def training_table(rows: Sequence[Row], problem: str) -> str:
    """Return loss and score at equal steps and at equal time: the middle of the seeds, and their range for the loss."""
    rows = [row for row in rows if row["kind"] == "training" and row["problem"] == problem]
    score = "error" if problem == "pinn" else "test accuracy"
    lines = [
        f"| `{problem}` | lr | loss, equal steps | {score} | loss, equal time | {score} |",
        "|---|--:|" + "--:|" * 4,
    ]
    for row in rows:
        if row["failure"]:
            lines.append(f"| {_label(row)} | | fails: `{row['failure']}` | | | |")
            continue
        cells = []
        for read in (at_equal_steps, at_equal_time):
            read_off = [read(one) for one in row["runs"]]
            per_step = read is at_equal_steps and all(
                one["curve"][-1][0] < one["steps"] and not one["diverged"] for one in row["runs"]
            )
            cells += ["", ""] if per_step else [_losses([x for x, _ in read_off]), _scores([s for _, s in read_off])]
        lr = f"{row['lr']:g}" + ("*" if row["at_edge"] else "")
        seeds = "" if len(row["runs"]) == 3 else f" ({len(row['runs'])} seeds)"
        lines.append(f"| {_label(row)}{seeds} | {lr} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _losses(values: Sequence[float]) -> str:
    texts = [
        f"{float(f'{v:.2g}'):g}" if math.isfinite(v) else "diverged"
        for v in (statistics.median(values), min(values), max(values))
    ]
    return texts[0] if texts[0] == texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _scores(values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    return f"{statistics.median(finite):.3f}" if finite else ""


def _label(row: Row) -> str:
    return f"**{row['label']}**" if row["ours"] else str(row["label"])


def check_page(rows: Sequence[Row]) -> str:
    """Return the page of `check_optimizer`'s outcomes."""
    rows = [row for row in rows if row["kind"] == "check"]
    lines = [
        "# Which conventions optimizers keep",
        "",
        "`optimizers.check.check_optimizer(MyOptimizer)` runs these checks on any optimizer; its documentation says",
        "what they stand for. Here is what it says of those that the benchmark compares, each stepped as its own",
        "documentation asks for. Made by `python -m benchmarks.bench_optimizers checks` and `report`.",
        "",
        "| optimizer | passed | failed | skipped |",
        "|---|--:|--:|--:|",
    ]
    details = []
    for row in rows:
        if row["failure"]:
            lines.append(f"| {_label(row)} | not run: `{row['failure']}` | | |")
            continue
        counts = [sum(s == status for _, s, _ in row["outcomes"]) for status in ("passed", "failed", "skipped")]
        lines.append(f"| {_label(row)} | " + " | ".join(map(str, counts)) + " |")
        details += _details(row)
    return "\n".join([*lines, "", *details, conditions(rows)]) + "\n"


def _details(row: Row) -> list[str]:
    lines = []
    for status, title in (("failed", "fails"), ("skipped", "skips")):
        chosen = [(name, reason) for name, s, reason in row["outcomes"] if s == status]
        if chosen:
            lines += [f"## {row['label']} {title}", ""]
            lines += [f"- {name}: `{reason.replace('`', chr(39))[:160].strip()}`" for name, reason in chosen]
            lines.append("")
    return lines


def write_report(rows: Sequence[Row]) -> None:
    """Renew the tables in README.md of this folder, and the page of the checks."""
    readme = Path(__file__).parent / "README.md"
    text = insert(readme.read_text(encoding="utf-8"), cost_table(rows), "optimizer-costs")
    problems = dict.fromkeys(row["problem"] for row in rows if row["kind"] == "training")
    tables = "\n".join(training_table(rows, problem) for problem in problems)
    readme.write_text(insert(text, tables, "optimizer-training"), encoding="utf-8")
    if any(row["kind"] == "check" for row in rows):
        (ROOT / "docs" / "optimizer_checks.md").write_text(check_page(rows), encoding="utf-8")
