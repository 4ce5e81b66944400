"""Hessian and Gauss-Newton products, all methods in one run: `python -m benchmarks.products.bench`.

A row comes from a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.harness import measure
from benchmarks.common.peers import METHODS, Operator
from benchmarks.common.problems import PROBLEMS
from benchmarks.common.processes import alone
from benchmarks.common.suite import Row, Rows, command

__all__ = ["OPERATORS", "main", "middle", "said"]

OPERATORS: list[Operator] = ["hessian", "ggn"]
TIMEOUT_SECONDS = 600


def said(row: dict[str, Any]) -> str:
    """Return a line on a row."""
    what = f"{row['problem']:4} {row['operator']:8} {row['method']:24}"
    if row.get("failure"):
        return f"{what} {row['failure']}"
    low, high = row["gradients_quartiles"]
    return (
        f"{what} {row['gradients']:6.2f} gradients ({low:.2f} to {high:.2f})  {1e3 * row['seconds']:8.1f} ms  "
        f"{row['extra_mebibytes']:+7.0f} MiB  error {row['error']:.0e}"
    )


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the median cost, and the costs of all runs beside it; a failure if any of them failed."""
    failed = [row for row in runs if row.get("failure")]
    if failed:
        return failed[0]
    ordered = sorted(runs, key=lambda row: row["gradients"])
    return {**ordered[(len(ordered) - 1) // 2], "gradients_runs": [row["gradients"] for row in runs]}


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("products", __doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=int, default=3, help="processes a row; they take turns")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a process")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    cases = [(p, o, m) for p in a.problems for o in a.operators for m in a.methods if o in METHODS[m].operators]
    runs: dict[tuple[str, str, str], list[Row]] = {case: [] for case in cases}
    with Rows(a.out, ("problem", "operator", "method"), len(cases) * a.runs) as rows:
        for case in cases * a.runs:
            rows.begin(" ".join(case))
            problem, operator, method = case
            known = {"problem": problem, "operator": operator, "method": method, "label": METHODS[method].label}
            settings = {"problem_name": problem, "operator": operator, "method_name": method, "seconds": a.seconds}
            row = alone(measure, known, timeout_seconds=TIMEOUT_SECONDS, threads=a.threads, **settings)
            runs[case].append(row)
            rows.add(middle(runs[case]), said=said(row))


if __name__ == "__main__":
    main()
