"""What moved? A few of this toolkit's rows, measured again and set beside the stored ones: `make bench-quick`.

Costs are in gradients, which alternate with what is measured; rows in results/ stay as they are. A figure has moved
where the quartiles of both measurements, or their ranges, lie apart. On a machine at work a tenth is nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.harness import measure
from benchmarks.common.problems import PROBLEMS, make_problem
from benchmarks.common.processes import alone
from benchmarks.common.suite import RESULTS, Row, stored
from benchmarks.exact.bench import PROBLEMS as EXACT_PROBLEMS
from benchmarks.exact.bench import row as timed
from benchmarks.per_example.bench import measure as measure_per_example
from curvature import Objective
from curvature.layerwise import exact_diagonal

__all__ = ["main", "measure_diagonal", "verdict"]

SECONDS, TIMEOUT_SECONDS = 2.0, 120.0
RANGES = ("gradients_quartiles", "gradients_range")


@dataclass(frozen=True)
class Case:
    """One stored row, and the call that measures it again."""

    what: str
    suite: str
    key: Row
    work: Callable[..., Any]
    arguments: dict[str, Any]


def measure_diagonal(problem_name: str) -> Row:
    """Return the row of the exact diagonal of the Gauss-Newton matrix."""
    problem = make_problem(problem_name)
    objective = Objective(problem.model, problem.loss, (problem.inputs, problem.targets))
    return timed(problem, "GGN diagonal", lambda: exact_diagonal(objective), rounds=6)


def cases() -> Iterator[Case]:
    """Yield what is measured."""
    for problem in PROBLEMS:
        for operator in ("hessian", "ggn"):
            key = {"problem": problem, "operator": operator, "method": "kept"}
            settings = {"problem_name": problem, "operator": operator, "method_name": "kept", "seconds": SECONDS}
            yield Case(f"{problem}, {operator} product", "products", key, measure, settings)
    for problem in PROBLEMS:
        key = {"problem": problem, "quantity": "norms", "method": "torch-curvature"}
        settings = {"problem_name": problem, "quantity": "norms", "method": "torch-curvature", "seconds": SECONDS}
        yield Case(f"{problem}, norms of single gradients", "per_example", key, measure_per_example, settings)
    for problem in EXACT_PROBLEMS:
        key = {"problem": problem, "method": "GGN diagonal"}
        yield Case(f"{problem}, exact diagonal", "exact", key, measure_diagonal, {"problem_name": problem})


def verdict(before: Row, now: Row) -> str:
    """Say which of two rows is cheaper, or that their spreads overlap."""
    (low, high), (old_low, old_high) = _spread(now), _spread(before)
    return "faster" if high < old_low else "slower" if low > old_high else "as before"


def _spread(row: Row) -> tuple[float, float]:
    low, high = next(row[name] for name in RANGES if name in row)
    return float(low), float(high)


def main() -> None:
    """Measure, and print the table."""
    warnings.simplefilter("ignore")
    table = Table("in gradients", "stored", "now", "now / stored", "")
    console = Console()
    with console.status("") as status:
        for case in cases():
            status.update(case.what)
            before = next(r for r in stored(RESULTS / f"{case.suite}.json") if case.key.items() <= r.items())
            now = alone(case.work, case.key, timeout_seconds=TIMEOUT_SECONDS, **case.arguments)
            if now.get("failure"):
                table.add_row(case.what, f"{before['gradients']:.2f}", f"fails: {now['failure']}")
                continue
            ratio = now["gradients"] / before["gradients"]
            figures = [f"{before['gradients']:.2f}", f"{now['gradients']:.2f}", f"{ratio:.2f}"]
            table.add_row(case.what, *figures, verdict(before, now))
    console.print(table)


if __name__ == "__main__":
    main()
