"""Tables of matrix optimizers: the price of a step, and what equal steps and equal gradients reach."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import conditions

__all__ = ["matrices_table"]

Row = dict[str, Any]


def matrices_table(rows: Sequence[Row]) -> str:
    """Return the Markdown tables of costs and of runs."""
    costs, runs = ([row for row in rows if row["kind"] == kind] for kind in ("cost", "run"))
    lines = ["| a step, in steps of AdamW | that refreshes | others | one in ten refreshes |", "|---|--:|--:|--:|"]
    for row in costs:
        figures = " | ".join(f"{row[key]:.2f}" for key in ("due", "other", "adamw_steps"))
        lines.append(f"| {row['problem']}: {row['method']} | {figures} |")
    lines += [
        "",
        "| run | steps | gradients | seconds | loss, best of the rates, and further seeds |",
        "|---|--:|--:|--:|---|",
    ]
    for problem, method, steps in dict.fromkeys((row["problem"], row["method"], row["steps"]) for row in runs):
        mine = [r for r in runs if (r["problem"], r["method"], r["steps"]) == (problem, method, steps)]
        best = min((r for r in mine if r["seed"] == 0 and r["loss"] is not None), key=lambda r: r["loss"])
        chosen = [best, *(r for r in mine if r["seed"] > 0 and r["lr"] == best["lr"])]
        digits = 3 if best["loss"] < 1 else 2
        gradients, seconds = (statistics.median(r[key] for r in chosen) for key in ("gradients", "seconds"))
        losses = ", ".join(f"{r['loss']:.{digits}f}" for r in chosen)
        name = f"{problem}: {method}, lr {best['lr']:g}"
        lines.append(f"| {name} | {steps} | {gradients:.0f} | {seconds:.0f} | {losses} |")
    return "\n".join([*lines, "", conditions(rows)]) + "\n"
