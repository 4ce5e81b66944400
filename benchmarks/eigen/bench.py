"""Eigenpairs of the Hessian of trained networks, all solvers in one run: `python -m benchmarks.eigen.bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.common.processes import BARS, row_of, write_rows
from benchmarks.common.trained import TRAINED
from benchmarks.eigen.methods import EIGEN_METHODS
from benchmarks.eigen.reference import reference

__all__ = ["compared", "main", "merged"]

RESULTS = Path(__file__).parents[1] / "results" / "eigen.json"
QUANTITIES = {"top-1": 1, "top-10": 10, "top-50": 50}
OURS = "eigsh"
GRACE_SECONDS = 600  # for the reference, residuals and what else surrounds the solver
Row = dict[str, Any]


def compared(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `times_ours`: products and seconds over those of our `eigsh` for the same pairs."""
    ours = {(r["problem"], r["k"]): r for r in rows if r["method"] == OURS and not r.get("failure")}
    result = []
    for row in rows:
        base = ours.get((row["problem"], row["k"]))
        if base is not None and not row.get("failure"):
            ratios = {key: row[key] / base[key] for key in ("products", "seconds")}
            row = {**row, "times_ours": ratios}
        result.append(row)
    return result


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the old rows with those of the same problem, k and method replaced, in the order of the options."""

    def key(row: Row) -> tuple[int, int, int]:
        return list(TRAINED).index(row["problem"]), row["k"], list(EIGEN_METHODS).index(row["method"])

    return [row for _, row in sorted({key(row): row for row in (*old, *new)}.items())]


def hopeless(k: int, smaller: Row | None, limit: float) -> str:
    """Return why a power iteration need not be started for k pairs, after the row of fewer; "" where it might end."""
    if smaller is None:
        return ""
    if (smaller.get("failure") or "").startswith(("stopped", "not run")):
        return f"not run: top {smaller['k']} {smaller['failure']}"
    if smaller.get("seconds") is not None and smaller["seconds"] * k / smaller["k"] > limit:
        return f"not run: top {smaller['k']} took {smaller['seconds']:.0f} s"
    return ""


def _summary(row: Row) -> str:
    what = f"{row['problem']:10} top-{row['k']:<3} {row['method']:20}"
    if row.get("failure"):
        return f"{what} {row['failure']}"
    verdict = "right" if row["right"] else "WRONG"
    return (
        f"{what} {row['products']:5} products {row['seconds']:7.1f} s, set-up {row['setup_seconds']:4.1f}, a product "
        f"{1e3 * row['product_seconds']:5.0f} ms, overhead {row['overhead']:5.2f}  {row['extra_mebibytes']:+6.0f} MiB  "
        f"residual {row['residual']:.0e} error {row['error']:.0e} {verdict} (says {row['converged']})"
    )


def _measured(options: Sequence[str], known: Row, limit: float) -> Row:
    return row_of("benchmarks.eigen.harness", options, known, timeout_seconds=2 * limit + GRACE_SECONDS)


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eigen.bench", description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--methods", nargs="+", choices=EIGEN_METHODS, default=list(EIGEN_METHODS))
    parser.add_argument("--limit", type=float, default=600.0, help="CPU seconds after which a solver is stopped")
    parser.add_argument("--keep", action="store_true", help="keep rows of --out that are not measured again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    cases = [(p, QUANTITIES[q], m) for p in a.problems for q in a.quantities for m in a.methods]
    old = json.loads(a.out.read_text(encoding="utf-8")) if a.keep and a.out.exists() else []
    new: list[Row] = []
    with Progress(*BARS, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for problem in a.problems:
            progress.update(task, description=f"reference of {problem}")
            reference(problem)
        for problem, k, method in cases:
            progress.update(task, description=f"{problem} top-{k} {method}")
            fewer = [r for r in merged(old, new) if (r["problem"], r["method"]) == (problem, method) and r["k"] < k]
            power = EIGEN_METHODS[method].which == "LM"
            reason = hopeless(k, fewer[-1] if fewer else None, a.limit) if power else ""
            known = {"problem": problem, "k": k, "method": method, "label": EIGEN_METHODS[method].label}
            options = [problem, str(k), method, "--limit", str(a.limit)]
            new.append({**known, "failure": reason} if reason else _measured(options, known, a.limit))
            progress.console.print(_summary(new[-1]), highlight=False, soft_wrap=True)
            progress.advance(task)
            write_rows(a.out, compared(merged(old, new)))  # after each row, so that a run can be cut short


if __name__ == "__main__":
    main()
