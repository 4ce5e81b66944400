"""How often error bars hold: the share of seeds whose nominal 95 % interval covers the truth, by quantity and data.

`python -m benchmarks.coverage.bench`. A case is a truth and a function from a seed to an interval; see `coverage`. An
interval of no width is an answer that claims to be exact: it must be right to rounding, and says nothing of coverage.
Of quantities with several entries, the share is that of all entries of all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.harness import git
from benchmarks.common.processes import BARS, write_rows
from benchmarks.coverage import spectra, statistics
from benchmarks.coverage.cases import Case, measure

__all__ = ["CASES", "main"]

RESULTS = Path(__file__).parents[1] / "results" / "coverage.json"
CASES: dict[str, Callable[[torch.dtype], Iterable[Case]]] = {
    "trace": spectra.trace_cases,
    "diagonal": spectra.diagonal_cases,
    "spectral sum": spectra.sum_cases,
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
Row = dict[str, Any]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the old rows with those measured again replaced, quantities in the order of `CASES`."""
    names = ("quantity", "method", "data", "dtype")
    rows = {tuple(row[name] for name in names): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: list(CASES).index(row["quantity"]))


def _summary(row: Row) -> str:
    share = "all exact" if row["coverage"] is None else f"{100 * row['coverage']:5.1f} %"
    wrong = f", {row['wrong']} exact and wrong" if row["wrong"] else ""
    said = f", {100 * row['warned']:.0f} % say so" if row["warned"] else ""
    return f"{row['quantity']:14} {row['method']:28} {row['data']:24} {row['dtype']}: {share}{wrong}{said}"


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage.bench", description=__doc__)
    parser.add_argument("--quantities", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--methods", nargs="+", help="beginnings of names; by default all")
    parser.add_argument("--data", nargs="+", help="names; by default all")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--keep", action="store_true", help="keep rows of --out that are not measured again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(a.out.read_text(encoding="utf-8")) if a.keep and a.out.exists() else []
    new: list[Row] = []
    with Progress(*BARS, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(a.quantities) * len(a.dtypes))
        for quantity in a.quantities:
            for dtype in a.dtypes:
                progress.update(task, description=f"{quantity} {dtype}")
                for case in CASES[quantity](getattr(torch, dtype)):
                    if a.methods and not case.method.startswith(tuple(a.methods)):
                        continue
                    if a.data and case.data not in a.data:
                        continue
                    start = time.process_time()
                    row = {"quantity": quantity, "method": case.method, "data": case.data, "dtype": dtype}
                    row |= measure(case, a.seeds) | {"seconds": time.process_time() - start, "git": git()}
                    new.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
                    progress.console.print(_summary(new[-1]), highlight=False, soft_wrap=True)
                write_rows(a.out, merged(old, new))
                progress.advance(task)


if __name__ == "__main__":
    main()
