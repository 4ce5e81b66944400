"""How often error bars hold: the share of seeds whose nominal 95 % interval covers the truth, by quantity and data.

`python -m benchmarks.coverage.bench`. A case is a truth and a function from a seed to an interval; see `coverage`. An
interval of no width is an answer that claims to be exact: it must be right to rounding, and says nothing of coverage.
Of quantities with several entries, the share is that of all entries of all seeds.

Of hundreds of rows some fall below 92 % by chance: a true 95 % does so in 2 % of rows of 200 seeds. What lies below
after the first seeds is counted again with 1000 fresh ones, and the row holds the second count only (`seeds`, and
`first`, the share of the first).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch

from benchmarks.common.processes import in_parallel
from benchmarks.common.suite import Row, Rows, command
from benchmarks.coverage import spectra, statistics
from benchmarks.coverage.cases import Case, measure

__all__ = ["CASES", "main"]

CASES: dict[str, Callable[[torch.dtype], Iterable[Case]]] = {
    "trace": spectra.trace_cases,
    "diagonal": spectra.diagonal_cases,
    "spectral sum": spectra.sum_cases,
    "Frobenius norm": spectra.frobenius_cases,
    "density": spectra.density_cases,
    "rank": spectra.rank_cases,
    "nullity": spectra.nullity_cases,
    "condition number": spectra.condition_cases,
    "log-volume": statistics.log_volume_cases,
    "PAC-Bayes": statistics.pac_bayes_cases,
    "noise scale": statistics.noise_scale_cases,
    "tr S": statistics.trace_of_noise_cases,
    "penalty": statistics.penalty_cases,
    "jackknife": statistics.jackknife_cases,
}
"""By quantity."""
LOW, RECOUNT = 0.92, range(10_000, 11_000)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with quantities in the order of `CASES`."""
    return sorted(rows, key=lambda row: list(CASES).index(row["quantity"]))


def chosen(
    quantity: str, dtype: str, methods: Sequence[str] | None, data: Sequence[str] | None
) -> list[tuple[int, Case]]:
    """Return the cases of a quantity with methods and data of these beginnings and names, and their places."""
    cases = enumerate(CASES[quantity](getattr(torch, dtype)))
    return [
        (i, case)
        for i, case in cases
        if (not methods or case.method.startswith(tuple(methods))) and (not data or case.data in data)
    ]


def measured(quantity: str, dtype: str, place: int, seeds: int) -> Row:
    """Return the row of the case at a place among those of a quantity in one precision."""
    start = time.process_time()
    case = next(islice(CASES[quantity](getattr(torch, dtype)), place, None))
    found = measure(case, range(seeds))
    if found["coverage"] < LOW:
        found = measure(case, RECOUNT) | {"first": found["coverage"]}
    row: Row = {"quantity": quantity, "method": case.method, "data": case.data, "dtype": dtype}
    row |= found | {"seconds": time.process_time() - start}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _summary(row: Row) -> str:
    share = "all exact" if row["coverage"] is None else f"{100 * row['coverage']:5.1f} %"
    wrong = f", {row['wrong']} exact and wrong" if row["wrong"] else ""
    said = f", {100 * row['warned']:.0f} % say so" if row["warned"] else ""
    return f"{row['quantity']:14} {row['method']:28} {row['data']:24} {row['dtype']}: {share}{wrong}{said}"


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("coverage", __doc__)
    parser.add_argument("--quantities", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--methods", nargs="+", help="beginnings of names; by default all")
    parser.add_argument("--data", nargs="+", help="names; by default all")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    a = parser.parse_args()
    tasks = [
        (quantity, dtype, place, a.seeds)
        for quantity in a.quantities
        for dtype in a.dtypes
        for place, _ in chosen(quantity, dtype, a.methods, a.data)
    ]
    with Rows(a.out, ("quantity", "method", "data", "dtype"), len(tasks), finish=in_order) as rows:
        for row in in_parallel(measured, tasks, a.processes):
            rows.add(row, said=_summary(row))


if __name__ == "__main__":
    main()
