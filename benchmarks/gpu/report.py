"""The tables of a GPU: products, eigenpairs, steps, heads, and whether its tests passed."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.markdown import conditions, marked
from benchmarks.products.report import Row, table

__all__ = ["gpu_table"]

KINDS = ("product", "pairs", "step", "head", "tests")


def gpu_table(rows: Sequence[Row]) -> str:
    """Return the Markdown for the rows of the GPU suite; what was not run is counted, not shown."""
    ran = [row for row in rows if not (row.get("failure") or "").startswith("not run")]
    kinds = {kind: [row for row in ran if row["kind"] == kind] for kind in KINDS}
    products = [row if row["dtype"] == "float32" else {**row, "problem": _narrow(row)} for row in kinds["product"]]
    parts = [table(products), *_waits(products)] if products else []
    for kind, make in (("pairs", _pairs), ("step", _steps), ("head", _heads)):
        if kinds[kind]:
            parts.append(make(kinds[kind]))
    parts += [_tests(row) for row in kinds["tests"]]
    if len(ran) < len(rows):
        parts.append(f"Not run, since the time was up: {len(rows) - len(ran)} rows.\n")
    return "\n".join(parts)


def _narrow(row: Row) -> str:
    return f"{row['problem']} in {row['dtype']}"


def _waits(rows: Sequence[Row]) -> list[str]:
    """Say how often products wait for the GPU, of those methods of which it is known."""
    found: dict[str, set[int]] = {}
    for row in rows:
        if row.get("waits") is not None:
            found.setdefault(row["label"], set()).add(row["waits"])
    said = [f"{label} {min(n)}" + (f" to {max(n)}" if len(n) > 1 else "") for label, n in found.items()]
    return [f"How often a product waits for the GPU: {', '.join(said)}.\n"] if said else []


def _pairs(rows: Sequence[Row]) -> str:
    footnotes: list[str] = []
    lines = ["| largest eigenpairs of the Hessian | pairs | seconds | products | memory |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        label = f"**torch-curvature**, {row['label']}" if row["method"] == "eigsh" else row["label"]
        name = f"| {row['problem'].upper()}, {label} | {row['k']} | "
        if row.get("failure"):
            lines.append(f"{name}fails{marked(f'`{_plain(row)}`', footnotes)} | | |")
            continue
        status = "" if row["converged"] else marked(f"`{row['status']}`", footnotes)
        lines.append(f"{name}{row['seconds']:.1f}{status} | {row['products']} | {_gibibytes(row)} |")
    measured = [row for row in rows if not row.get("failure")]
    facts = f"Memory is the peak beyond model and data. {conditions(measured)}" if measured else ""
    return _joined(lines, footnotes, facts)


def _steps(rows: Sequence[Row]) -> str:
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    footnotes: list[str] = []
    heads = [problem.upper() for problem in problems]
    lines = ["| one step, in steps of SGD | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(problems)]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["problem"]: row for row in rows if row["method"] == method}
        cells = [_step_cell(found[p], footnotes) if p in found else "" for p in problems]
        lines.append(f"| {next(iter(found.values()))['label']} | " + " | ".join(cells) + " |")
    return _joined(lines, footnotes, "In brackets the peak memory beyond model and data, gradients and state included.")


def _step_cell(row: Row, footnotes: list[str]) -> str:
    if row.get("failure"):
        return f"fails{marked(f'`{_plain(row)}`', footnotes)}"
    return f"{row['sgd_steps']:.1f} ({_gibibytes(row)})"


def _heads(rows: Sequence[Row]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    footnotes: list[str] = []
    lines = ["| N, V, d | matrix | " + " | ".join(methods) + " |", "|---|---|" + "--:|" * len(methods)]
    for problem, operator in dict.fromkeys((row["problem"], row["operator"]) for row in rows):
        cells = []
        for method in methods:
            key = (problem, operator, method)
            row = next((r for r in rows if (r["problem"], r["operator"], r["method"]) == key), None)
            if row is None:
                cells.append("")
            elif row.get("failure"):
                cells.append(f"fails{marked(f'`{_plain(row)}`', footnotes)}")
            else:
                cells.append(f"{row['seconds']:.3f} s, {_gibibytes(row)}")
        lines.append(f"| {problem.replace(',', ', ')} | {operator} | " + " | ".join(cells) + " |")
    return _joined(lines, footnotes, "A product of N rows of d features behind V classes; `whole` holds N x V logits.")


def _tests(row: Row) -> str:
    if row.get("failure"):
        return f"Tests that need a GPU: {row['failure']}.\n"
    failed = f", {len(row['failed'])} failed ({', '.join(row['failed'])})" if row["failed"] else ", none failed"
    return f"Tests that need a GPU: {row['passed']} passed{failed}, in {row['seconds']:.0f} s on {row['device']}.\n"


def _gibibytes(row: Row) -> str:
    return f"{row['peak_mebibytes'] / 1024:.1f} GiB"


def _plain(row: Row) -> str:
    """Return the first sentence of a failure, fit for code in a table."""
    return str(row["failure"]).split(". ")[0].replace("`", "'").replace("|", "\\|")


def _joined(lines: list[str], footnotes: list[str], facts: str) -> str:
    notes = [f"{i}. {text}" for i, text in enumerate(footnotes, start=1)]
    return "\n".join([*lines, "", *notes, *([""] if notes and facts else []), *([facts] if facts else [])]) + "\n"
