"""Tables of matrix optimizers: the price of a step, and what equal steps and equal gradients reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.markdown import conditions

__all__ = ["matrices_table", "race_table"]

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
        chosen = _tuned(mine)
        best = chosen[0]
        digits = 3 if best["loss"] < 1 else 2
        gradients, seconds = (statistics.median(r[key] for r in chosen) for key in ("gradients", "seconds"))
        losses = ", ".join(f"{r['loss']:.{digits}f}" for r in chosen)
        name = f"{problem}: {method}, lr {best['lr']:g}"
        lines.append(f"| {name} | {steps} | {gradients:.0f} | {seconds:.0f} | {losses} |")
    return "\n".join([*lines, "", conditions([*costs, *runs])]) + "\n"


def race_table(rows: Sequence[Row]) -> str:
    """Return the Markdown tables of the race, one a problem: median loss over seeds, its range, who beats AdamW."""
    rows = [row for row in rows if row["kind"] == "race"]
    lines: list[str] = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        name = "error" if any("error" in row for row in mine) else "loss"
        lines += [
            f"| `{problem}` | lr | steps | {name}, equal steps | seconds | lr | steps | {name}, equal time |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        reached: dict[str, dict[str, dict[int, float]]] = {"steps": {}, "time": {}}
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = []
            for equal in ("steps", "time"):
                of_method = [row for row in mine if (row["method"], row["equal"]) == (method, equal)]
                chosen = _tuned(of_method)
                if not chosen:
                    failure = of_method[0]["failure"] if of_method else None
                    cells += ["", "", "diverges" if failure is None else f"fails: {failure[:60]}"]
                    cells += [""] if equal == "steps" else []
                    continue
                reached[equal][method] = {row["seed"]: _measured(row) for row in chosen}
                found = sorted(reached[equal][method].values())
                rates = {row["lr"] for row in of_method}
                at_end = len(rates) > 1 and chosen[0]["lr"] in (min(rates), max(rates))
                cells += [f"{chosen[0]['lr']:g}{' (the last tried)' if at_end else ''}", f"{chosen[0]['steps']}"]
                cells.append(f"{statistics.median(found):.3g} ({found[0]:.3g} to {found[-1]:.3g})")
                if equal == "steps":
                    cells.append(f"{statistics.median(row['seconds'] for row in chosen):.3g}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines += ["", *(f"{_verdict(equal, of)}\n" for equal, of in reached.items() if "AdamW" in of)]
    return "\n".join([*lines, conditions(rows)]) + "\n" if rows else ""


def _measured(row: Row) -> float:
    return math.inf if row["loss"] is None else float(row.get("error", row["loss"]) or 0.0)


def _verdict(equal: str, reached: dict[str, dict[int, float]]) -> str:
    """Say which methods are ahead of AdamW and which behind it on every seed, from the same starts."""
    base = reached["AdamW"]
    others = [method for method in reached if method != "AdamW"]
    ahead = [m for m in others if all(x < base[seed] for seed, x in reached[m].items())]
    behind = [m for m in others if all(x > base[seed] for seed, x in reached[m].items())]
    best = min(reached, key=lambda m: statistics.median(reached[m].values()))
    parts = [f"Least median at equal {equal}: {best}."]
    for said, found in (("Ahead of AdamW", ahead), ("Behind it", behind)):
        parts.append(f"{said} on every seed: {'; '.join(found) or 'none'}.")
    return " ".join(parts)


def _tuned(rows: Sequence[Row]) -> list[Row]:
    """Return the run with the first seed whose loss is least, and those with further seeds at its rate."""
    first = [row for row in rows if row["seed"] == 0 and row["loss"] is not None]
    if not first:
        return []
    best = min(first, key=lambda row: row["loss"])
    return [best, *(row for row in rows if row["seed"] > 0 and row["lr"] == best["lr"])]
