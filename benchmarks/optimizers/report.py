"""Tables of the optimizers' benchmark: costs and training for README.md of this folder, checks for docs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import conditions, insert, marked
from benchmarks.optimizers.curves import at_equal_steps, at_equal_time

__all__ = [
    "check_page",
    "cost_table",
    "memory_sentence",
    "micro_table",
    "training_table",
    "variant_table",
    "write_report",
]

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def cost_table(rows: Sequence[Row], kind: str = "cost") -> str:
    """Return the cost of a step in steps of SGD (of AdamW for `kind="width"`), a line a method, a column a problem."""
    rows, unit = [row for row in rows if row["kind"] == kind], "sgd" if kind == "cost" else "adamw"
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    footnotes: list[str] = []
    lines = [
        f"| step, in steps of {'SGD' if unit == 'sgd' else 'AdamW'} | " + " | ".join(f"`{p}`" for p in problems) + " |"
    ]
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
                cells.append(f"{row[f'{unit}_steps']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})")
        lines.append(f"| {_label(next(iter(found.values())))} | " + " | ".join(cells) + " |")
    lines += ["", *[f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]]
    lines.append(f"Median over rounds that take turns, and quartiles. {conditions(rows)}")
    return "\n".join(lines) + "\n"


def micro_table(rows: Sequence[Row]) -> str:
    """Return how far micro-batches take each method from the joined batch: middle of the seeds, and the largest."""
    rows = [row for row in rows if row["kind"] == "micro"]
    lines = ["| 2 x 16 against 1 x 32, 25th update | difference | largest of the seeds |", "|---|--:|--:|"]
    for row in rows:
        if row["failure"]:
            lines.append(f"| {_label(row)} | fails: `{row['failure']}` | |")
        else:
            values = row["differences"]
            lines.append(f"| {_label(row)} | {statistics.median(values):.0e} | {max(values):.0e} |")
    return "\n".join([*lines, "", conditions(rows)]) + "\n"


def training_table(rows: Sequence[Row], problem: str, kind: str = "training") -> str:
    """Return loss and score at equal steps and at equal time: the middle of the seeds, and their range for the loss."""
    rows = [row for row in rows if row["kind"] == kind and row["problem"] == problem]
    score = "error" if problem == "pinn" else "test accuracy"
    lines = [
        f"| `{problem}` | lr | loss, equal steps | {score} | lr | loss, equal time | {score} |",
        "|---|" + "--:|" * 6,
    ]
    for row in rows:
        if row["failure"]:
            lines.append(f"| {_label(row)} | | fails: `{row['failure']}` | | | | |")
            continue
        cells = []
        for choice, read in ((row["equal_steps"], at_equal_steps), (row, at_equal_time)):
            if choice is None:
                cells += ["", "", ""]
                continue
            found = [read(one) for one in choice["runs"]]
            lr = f"{choice['lr']:g}" + ("*" if choice["at_edge"] else "")
            cells += [lr, _losses([loss for loss, _ in found]), _scores([value for _, value in found])]
        seeds = "" if len(row["runs"]) == 3 else f" ({len(row['runs'])} seeds)"
        lines.append(f"| {_label(row)}{seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def variant_table(rows: Sequence[Row]) -> str:
    """Return the losses of AdaHessian and its variants on all problems that these were run on."""
    problems = list(dict.fromkeys(row["problem"] for row in rows if row["kind"] == "variant"))
    lines = ["| | " + " | ".join(f"`{p}`, equal steps | `{p}`, equal time" for p in problems) + " |"]
    lines.append("|---|" + "--:|" * 2 * len(problems))
    chosen = [row for row in rows if row["kind"] == "variant" or row["method"] in AMONG_VARIANTS]
    chosen = [row for row in chosen if row["kind"] in ("training", "variant")]
    for method in dict.fromkeys([*AMONG_VARIANTS, *(row["method"] for row in chosen)]):
        found = {row["problem"]: row for row in chosen if row["method"] == method}
        cells = []
        for problem in problems:
            row = found.get(problem)
            if row is None or row["failure"]:
                cells += ["", ""] if row is None else ["fails", "fails"]
                continue
            cells.append(_losses([at_equal_steps(one)[0] for one in row["equal_steps"]["runs"]]))
            cells.append(_losses([at_equal_time(one)[0] for one in row["runs"]]))
        label = next(iter(found.values()))["label"].removeprefix("torch-curvature ")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


AMONG_VARIANTS = ("adamw", "adahessian", "adahessian-10", "adahessian-4-probes")
"""Methods of the training tables that the variants are compared with."""


def memory_sentence(rows: Sequence[Row]) -> str:
    """Return what a thousand steps added to each process."""
    rows = [row for row in rows if row["kind"] == "memory"]
    said = [
        f"{row['label']} " + (f"fails (`{row['failure']}`)" if row["failure"] else f"{row['grown_mebibytes']:.1f} MiB")
        for row in rows
    ]
    return "Growth of the resident set over 1,000 steps of `pinn` after the first 100: " + ", ".join(said) + ".\n"


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
        "`optimizers.check_optimizer(MyOptimizer)` runs these checks on any optimizer; its",
        "documentation says what they stand for. Here is what it says of those that the benchmark compares, each",
        "stepped as its own documentation asks for. Made by `python -m benchmarks.optimizers.bench checks` and",
        "`report`.",
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
    text = insert(text, cost_table(rows, "width"), "optimizer-widths")
    text = insert(text, micro_table(rows), "optimizer-micro")
    problems = dict.fromkeys(row["problem"] for row in rows if row["kind"] == "training")
    tables = "\n".join(training_table(rows, problem) for problem in problems)
    text = insert(text, tables, "optimizer-training")
    text = insert(text, variant_table(rows), "optimizer-variants")
    readme.write_text(insert(text, memory_sentence(rows), "optimizer-memory"), encoding="utf-8")
    if any(row["kind"] == "check" for row in rows):
        (ROOT / "docs" / "optimizer_checks.md").write_text(check_page(rows), encoding="utf-8")
