"""All suites, in parts of a quarter of an hour: `make bench`, and again to continue where it was interrupted.

    python -m benchmarks.common.parts [PART ...] [--list]

Without names all parts are measured that were not since the last complete run, and the tables are renewed after each.
What a part has taken stands in runs/bench.json; when all are measured the next run begins anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.problems import PROBLEMS
from benchmarks.common.suite import ROOT
from benchmarks.common.trained import TRAINED
from benchmarks.costs.calls import NETS
from benchmarks.coverage.bench import CASES
from benchmarks.descent.bench import CASES as CURVES
from benchmarks.estimators.reference import ESTIMATED
from benchmarks.exact.bench import PROBLEMS as EXACT
from benchmarks.head.bench import SIZES
from benchmarks.matrices.bench import COSTS, RUNS
from benchmarks.matrices.bench import PROBLEMS as RACES
from benchmarks.memory.bench import PARTS as MEMORY
from benchmarks.newton.bench import SUITES
from benchmarks.optimizers.bench import PROBLEMS as OPTIMIZED
from benchmarks.races.bench import TASKS as RACED
from benchmarks.relations.bench import RELATIONS
from benchmarks.scale.bench import GRIDS
from benchmarks.sharded.bench import WORK as SHARDED
from benchmarks.sharpness.bench import COMMANDS
from benchmarks.tracking.bench import STARTS
from benchmarks.tracking.rates import TASKS
from benchmarks.tracking.spikes import RECIPES

__all__ = ["PARTS", "STATE", "run"]

STATE = ROOT / "runs" / "bench.json"
_SPLIT: dict[str, tuple[str, Sequence[str]]] = {
    "products": ("--problems", list(PROBLEMS)),
    "eigen": ("--problems", list(TRAINED)),
    "tracking": ("--starts", list(STARTS)),
    "density": ("", ()),
    "estimators": ("--problems", list(ESTIMATED)),
    "exact": ("--problems", EXACT),
    "per_example": ("--problems", list(PROBLEMS)),
    "scale": ("--varied", list(GRIDS)),
    "noise": ("", ()),
    "regularization": ("", ()),
    "pruning": ("", ()),
    "sharpness": ("--what", COMMANDS),
    "relations": ("", list(RELATIONS)),
    "newton": ("--suites", SUITES),
    "costs": ("--nets", NETS),
    "coverage": ("--quantities", list(CASES)),
    "completeness": ("", ()),
    "compare": ("", ()),
    "descent": ("--cases", list(CURVES)),
    "head": ("--sizes", SIZES),
    "memory": ("--parts", MEMORY),
    "sharded": ("--what", list(SHARDED)),
    "optimizers.line_search": ("", ()),
    "races": ("--tasks", RACED),
    "tracking.along": ("", ()),
    "tracking.rates": ("--tasks", list(TASKS)),
    "tracking.spikes": ("--tasks", list(RECIPES)),
}
ELSEWHERE = ("gpu", "pretrained", "learned")
"""Suites that are no part: they need a GPU, packages with models, a training of hours."""
_ALL = [
    *((suite, option, value) for suite, (option, values) in _SPLIT.items() for value in values or ("",)),
    *((f"optimizers {what}", "--problems", name) for what, names in OPTIMIZED.items() for name in names),
    ("optimizers report", "", ""),
    *(("matrices costs", "--problems", name) for name in COSTS),
    *(("matrices runs", "--problems", name) for name in RUNS),
    *(("matrices race", "--problems", name) for name in RACES),
]


def _part(suite: str, option: str, value: str) -> tuple[str, list[str]]:
    module, *what = suite.split()
    name = "-".join(filter(None, (*suite.split(), value.replace(",", "").replace(" ", "_"))))
    file = module if "." in module else f"{module}.bench"
    return name, [f"benchmarks.{file}", *what, *(filter(None, (option, value)) if value else ())]


PARTS = dict(_part(*part) for part in _ALL)
"""The arguments of `python -m` that measure each."""


def run(names: Sequence[str], state: Path, measure: Callable[[list[str]], None]) -> dict[str, float]:
    """Measure parts, those that are named or all that are not in the state, and return the seconds of each.

    Args:
        names: of parts; none for what is left of all.
        state: a file of what each part has taken; removed once all are measured.
        measure: runs `python -m` with arguments, and raises if that fails.
    """
    known: dict[str, float] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    spent: dict[str, float] = {}
    for name in names or [part for part in PARTS if part not in known]:
        print(f"{name}: python -m {' '.join(PARTS[name])}", flush=True)
        start = time.perf_counter()
        measure(PARTS[name])
        known[name] = spent[name] = round(time.perf_counter() - start, 1)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(known, indent=0), encoding="utf-8")
        measure(["benchmarks.common.report"])
    if known.keys() >= PARTS.keys():
        state.unlink()
    return spent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.common.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []])
    parser.add_argument("--list", action="store_true", help="print the parts, and what is measured")
    a = parser.parse_args()
    if a.list:
        known = json.loads(STATE.read_text(encoding="utf-8")) if STATE.exists() else {}
        print("\n".join(f"{name:32}{known.get(name, ''):>8}" for name in PARTS))
        return
    for name, seconds in run(a.parts, STATE, _measured).items():
        print(f"{name:32}{seconds:8.0f} s")


def _measured(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
