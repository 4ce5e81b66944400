"""Eigenpairs of the Hessian of trained networks, all solvers in one run: `python -m benchmarks.eigen.bench`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.processes import alone
from benchmarks.common.suite import Row, Rows, command
from benchmarks.common.trained import TRAINED
from benchmarks.eigen.harness import measure_eigen
from benchmarks.eigen.methods import EIGEN_METHODS
from benchmarks.eigen.reference import reference

__all__ = ["compared", "main"]

QUANTITIES = {"top-1": 1, "top-10": 10, "top-50": 50}
OURS = "eigsh"
GRACE_SECONDS = 600  # for the reference, residuals and what else surrounds the solver


def compared(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in the order of the options, with `times_ours`: products and seconds over our `eigsh`'s."""

    def place(row: Row) -> tuple[int, int, int]:
        return list(TRAINED).index(row["problem"]), row["k"], list(EIGEN_METHODS).index(row["method"])

    ours = {(r["problem"], r["k"]): r for r in rows if r["method"] == OURS and not r.get("failure")}
    result = []
    for row in sorted(rows, key=place):
        base = ours.get((row["problem"], row["k"]))
        if base is not None and not row.get("failure"):
            ratios = {key: row[key] / base[key] for key in ("products", "seconds")}
            row = {**row, "times_ours": ratios}
        result.append(row)
    return result


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


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("eigen", __doc__)
    parser.add_argument("--problems", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--methods", nargs="+", choices=EIGEN_METHODS, default=list(EIGEN_METHODS))
    parser.add_argument("--limit", type=float, default=600.0, help="CPU seconds after which a solver is stopped")
    a = parser.parse_args()
    cases = [(p, QUANTITIES[q], m) for p in a.problems for q in a.quantities for m in a.methods]
    with Rows(a.out, ("problem", "k", "method"), len(cases), finish=compared) as rows:
        for problem in a.problems:
            rows.begin(f"reference of {problem}")
            reference(problem)
        for problem, k, method in cases:
            rows.begin(f"{problem} top-{k} {method}")
            fewer = [r for r in rows.rows if (r["problem"], r["method"]) == (problem, method) and r["k"] < k]
            power = EIGEN_METHODS[method].which == "LM"
            reason = hopeless(k, fewer[-1] if fewer else None, a.limit) if power else ""
            row: Row = {"problem": problem, "k": k, "method": method}
            row |= {"label": EIGEN_METHODS[method].label, "failure": reason}
            if not reason:
                longest = 2 * a.limit + GRACE_SECONDS
                settings = {"problem_name": problem, "k": k, "method_name": method, "limit": a.limit}
                row = alone(measure_eigen, row, timeout_seconds=longest, **settings)
            rows.add(row, said=_summary(row))


if __name__ == "__main__":
    main()
