"""Hessian and Gauss-Newton products, all methods in one run: `python -m benchmarks.products.bench [--device cuda]`.

A row comes from a process of its own. On a GPU, where torch's allocator tells one row's memory from another's, all come
from this one.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.harness import measure, one_line
from benchmarks.common.peers import METHODS
from benchmarks.common.problems import GPU_PROBLEMS, PROBLEMS
from benchmarks.common.processes import BARS, row_of, write_rows

__all__ = ["main", "middle"]

RESULTS = {"cpu": "products.json", "cuda": "products_gpu.json"}
OPERATORS = ["hessian", "ggn"]
TIMEOUT_SECONDS = 600


def _row(problem: str, operator: str, method: str, *, seconds: float, threads: int) -> dict[str, Any]:
    options = ["--seconds", str(seconds), "--threads", str(threads)]
    known = {"problem": problem, "operator": operator, "method": method, "label": METHODS[method].label}
    return row_of(
        "benchmarks.common.harness", [problem, operator, method, *options], known, timeout_seconds=TIMEOUT_SECONDS
    )


def _gpu_row(problem: str, operator: Any, method: str, *, seconds: float) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' deprecations
        try:
            return asdict(measure(problem, operator, method, seconds=seconds, device="cuda"))
        except torch.OutOfMemoryError as error:
            known = {"problem": problem, "operator": operator, "method": method, "label": METHODS[method].label}
            return {**known, "failure": one_line(error)}
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def _summary(row: dict[str, Any]) -> str:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products.bench", description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS, *GPU_PROBLEMS])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=int, default=3, help="processes a row; they take turns")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=RESULTS, default="cpu")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    out = a.out or Path(__file__).parents[1] / "results" / RESULTS[a.device]
    problems = a.problems or list(GPU_PROBLEMS if a.device == "cuda" else PROBLEMS)
    cases = [(p, o, m) for p in problems for o in a.operators for m in a.methods if o in METHODS[m].operators]
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    with Progress(*BARS, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases) * a.runs)
        for _ in range(a.runs):
            for case in cases:
                progress.update(task, description=" ".join(case))
                if a.device == "cuda":
                    runs[case].append(_gpu_row(*case, seconds=a.seconds))
                else:
                    runs[case].append(_row(*case, seconds=a.seconds, threads=a.threads))
                progress.console.print(_summary(runs[case][-1]), highlight=False, soft_wrap=True)
                progress.advance(task)
                write_rows(out, [middle(found) for found in runs.values() if found])  # so that a run can be cut short


if __name__ == "__main__":
    main()
