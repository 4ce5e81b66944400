"""The table of products: a line a method, a column a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.harness import DOUBLE_PARAMS
from benchmarks.common.markdown import conditions, marked

__all__ = ["Row", "table"]

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
        heads = [f"{p.upper()}, {_size(sizes[p])}" if p in sizes else p.upper() for p in problems]
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


def _size(n: int) -> str:
    return f"{n / 1e3:.0f}k" if n < 1e6 else f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.2f}B"


def _right(row: Row) -> bool:
    return not row.get("failure") and row["error"] is not None and bool(row["error"] <= WRONG)


def _cell(row: Row, best: float | None, footnotes: list[str]) -> str:
    if row.get("failure"):
        return f"fails{marked(_escaped(row['failure']), footnotes)}"
    cost = f"{row['gradients']:.1f}"
    cost = f"**{cost}**" if best is not None and cost == f"{best:.1f}" and _right(row) else cost
    peak = row.get("peak_mebibytes")
    cell = f"{cost} ({row['extra_mebibytes']:+.0f} MiB)" if peak is None else f"{cost} ({peak / 1024:.1f} GiB)"
    if row["error"] is None:
        cell += ", not compared"
    elif not _right(row):
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
        f"peak memory {_memory(measured)}; blocks are per column. Every product is compared with double backward "
        f"in float64{_beyond(measured)}: all agree to {worst:.0e}, except where the table says wrong. "
        f"{_looks(measured)}{conditions(measured)}"
    )


def _memory(rows: Sequence[Row]) -> str:
    if all(row.get("peak_mebibytes") is None for row in rows):
        return "above that of one gradient"
    return "beyond model, data and vector"


def _beyond(rows: Sequence[Row]) -> str:
    large = any(row["num_params"] > DOUBLE_PARAMS for row in rows)
    return f" (float32 above {DOUBLE_PARAMS / 1e6:.0f} million parameters)" if large else ""


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
