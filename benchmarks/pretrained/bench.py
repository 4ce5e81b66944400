"""The curvature of pretrained models that packages ship, by the command: `python -m benchmarks.pretrained.bench`.

Needs the packages of requirements/pretrained.txt. Each model is inspected in a process of its own, without its layers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from analysis import load_run
from analysis.inspection.study import InspectionRun
from analysis.records.measured import Measured
from analysis.show.wording import quantity
from benchmarks.common.processes import ROOT
from benchmarks.common.suite import Row, Rows, command
from benchmarks.pretrained.tasks import TASKS

__all__ = ["main", "pretrained_table", "row_of"]

TIMEOUT_SECONDS = 3600
OPTIONS = {"minilm": ("--no-check", "--k", "3", "--num-bottom", "1", "--num-steps", "8")}
"""Of the command, where its default of 96 vectors would take 8 GiB."""


def row_of(name: str, folder: Path) -> Row:
    """Return the row of a run folder of `curvature inspect`."""
    run = load_run(folder)
    assert isinstance(run, InspectionRun)
    found = run.inspection
    numbers = {
        "sharpness": found.sharpness,
        "trace": Measured(value=float(found.trace.value), stderr=float(found.trace.stderr)),
        "condition": found.effective_condition,
        "negative_share": found.negative_share,
    }
    row: Row = {"model": name, "description": run.description, "num_params": found.num_params, "loss": found.loss}
    row |= {key: {"value": known.value, "stderr": known.stderr} for key, known in numbers.items()}
    products = {"products": found.trace.num_matvecs, "seconds": found.cost.seconds}
    return row | products | {"dtype": found.dtype, "device": found.device, "notes": list(found.notes)}


def measure(name: str, folder: Path) -> Row:
    """Inspect one model, and return its row, or a failure."""
    task = f"{Path(__file__).with_name('tasks.py').relative_to(ROOT)}:{name}"
    said = [sys.executable, "-m", "analysis.cli", "inspect", task, "--no-layers", "--seed", "0", "--out", str(folder)]
    said += OPTIONS.get(name, ())
    try:
        done = subprocess.run(said, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"model": name, "failure": f"took more than {TIMEOUT_SECONDS} s"}
    if done.returncode:
        return {"model": name, "failure": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return row_of(name, folder)


def pretrained_table(rows: list[Row]) -> str:
    """Return the Markdown table."""
    heads = ["model", "parameters", "largest λ", "trace", "effective condition", "negative", "products"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        if row.get("failure"):
            lines.append(f"| {row['model']} | fails: {row['failure']} |" + " |" * (len(heads) - 2))
            continue
        known = {key: Measured(**row[key]) for key in ("sharpness", "trace", "condition", "negative_share")}
        share = Measured(value=100 * known["negative_share"].value, stderr=100 * known["negative_share"].stderr)
        figures = [quantity(known[key], 3) for key in ("sharpness", "trace", "condition")]
        cells = [row["model"], f"{row['num_params']:,}".replace(",", " "), *figures, f"({quantity(share)}) %"]
        lines.append("| " + " | ".join([*cells, str(row["products"])]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("pretrained", __doc__)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    a = parser.parse_args()
    with Rows(a.out, ("model",), len(a.models)) as rows:
        for name in a.models:
            rows.begin(name)
            with TemporaryDirectory() as folder:
                row = measure(name, Path(folder) / "run")
            rows.add(row, said=f"{name}: {row.get('failure') or row['sharpness']}")


if __name__ == "__main__":
    main()
