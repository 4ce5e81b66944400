"""The curvature of pretrained models that packages ship, by the command: `python -m benchmarks.pretrained.bench`.

Needs the packages of requirements/pretrained.txt. Each model is inspected in a process of its own, MiniLM by the
defaults of the command and the others without their layers; `--layers` takes the traces of MiniLM's parts instead, into
rows of their own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from analysis import load_run
from analysis.inspection.study import InspectionRun
from analysis.records.measured import Measured
from analysis.show.wording import duration, quantity
from analysis.tasks.task import Task
from benchmarks.common.processes import ROOT
from benchmarks.common.suite import Row, Rows, command
from benchmarks.pretrained.tasks import TASKS, minilm
from curvature import HessianOperator

__all__ = ["main", "minilm_parts", "pretrained_table", "row_of", "traces_of_parts"]

TIMEOUT_SECONDS = 7200
IN_FULL = ("minilm",)
"""Inspected by the defaults of the command, layer by layer and all."""


def row_of(name: str, folder: Path) -> Row:
    """Return the row of a run folder of `curvature inspect`."""
    run = load_run(folder)
    assert isinstance(run, InspectionRun)
    assert run.cost is not None
    found = run.inspection
    numbers = {
        "sharpness": found.sharpness,
        "trace": Measured(value=float(found.trace.value), stderr=float(found.trace.stderr)),
        "condition": found.effective_condition,
        "negative_share": found.negative_share,
    }
    row: Row = {"model": name, "description": run.description, "num_params": found.num_params, "loss": found.loss}
    row |= {key: {"value": known.value, "stderr": known.stderr} for key, known in numbers.items()}
    products: Row = {"products": found.trace.num_matvecs, "seconds": found.cost.seconds}
    products |= {"price_seconds": run.cost.expected_seconds, "peak_mebibytes": found.cost.peak_bytes / 2**20}
    products["stages"] = [[stage.name, stage.planned, stage.num_matvecs, stage.seconds] for stage in found.cost.stages]
    return row | products | {"dtype": found.dtype, "device": found.device, "notes": list(found.notes)}


def measure(name: str, folder: Path) -> Row:
    """Inspect one model, and return its row, or a failure."""
    task = f"{Path(__file__).with_name('tasks.py').relative_to(ROOT)}:{name}"
    said = [sys.executable, "-m", "analysis.cli", "inspect", task, "--seed", "0", "--out", str(folder)]
    said += () if name in IN_FULL else ("--no-layers",)
    try:
        done = subprocess.run(said, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"model": name, "failure": f"took more than {TIMEOUT_SECONDS} s"}
    if done.returncode:
        return {"model": name, "failure": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return row_of(name, folder)


def traces_of_parts(task: Task, parts: Mapping[str, str | Sequence[str]], num_probes: int) -> list[Row]:
    """Return a row for each part of a model: the trace of its diagonal block of the Hessian, from shared products.

    Args:
        task: the model and its data.
        parts: name -> which parameters.
        num_probes: vectors of random signs z, one product each: E z'Hz over the entries of a part is its trace.
    """
    objective = task.objective()
    blocks = {name: objective.space.block(selection, task.model) for name, selection in parts.items()}
    H, signs, samples = HessianOperator(objective), torch.Generator().manual_seed(0), []
    start = time.monotonic()
    for _ in range(num_probes):
        z = torch.randint(0, 2, (objective.num_params,), generator=signs).to(objective.dtype) * 2 - 1
        both = z * (H @ z)
        samples.append(torch.stack([block.take(both).double().sum() for block in blocks.values()]))
    found = torch.stack(samples)
    known = {"model": task.name, "products": num_probes, "seconds": time.monotonic() - start}
    values = zip(blocks.items(), found.mean(0).tolist(), (found.std(0) / num_probes**0.5).tolist(), strict=True)
    return [
        {**known, "part": name, "num_params": block.num_params, "trace": value, "trace_stderr": stderr}
        for (name, block), value, stderr in values
    ]


def minilm_parts() -> dict[str, str | Sequence[str]]:
    """Return the parts of MiniLM by name."""
    parts: dict[str, str | Sequence[str]] = {
        "table of words": "*word_embeddings.*",
        "places and types": ["*position_embeddings.*", "*token_type_embeddings.*"],
    }
    for i in range(6):
        layer = f"*layer.{i}."
        parts[f"attention {i + 1}"] = [f"{layer}attention.self.*", f"{layer}attention.output.dense.*"]
        parts[f"MLP {i + 1}"] = [f"{layer}intermediate.*", f"{layer}output.dense.*"]
    return {**parts, "norms": "*LayerNorm.*"}


def pretrained_table(rows: list[Row]) -> str:
    """Return the Markdown table."""
    heads = ["model", "parameters", "largest λ", "trace", "effective condition", "negative"]
    heads += ["products", "price", "time"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        if row.get("failure"):
            lines.append(f"| {row['model']} | fails: {row['failure']} |" + " |" * (len(heads) - 2))
            continue
        known = {key: Measured(**row[key]) for key in ("sharpness", "trace", "condition", "negative_share")}
        share = Measured(value=100 * known["negative_share"].value, stderr=100 * known["negative_share"].stderr)
        figures = [quantity(known[key], 3) for key in ("sharpness", "trace", "condition")]
        cells = [row["model"], f"{row['num_params']:,}".replace(",", " "), *figures, f"({quantity(share)}) %"]
        spent = sum(num_matvecs for _, _, num_matvecs, _ in row["stages"])
        times = (duration(row["price_seconds"]), duration(row["seconds"]))
        lines.append("| " + " | ".join([*cells, str(spent), *times]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("pretrained", __doc__)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--layers", action="store_true", help="traces of the parts of MiniLM (2 minutes)")
    a = parser.parse_args()
    if a.layers:
        with Rows(a.out.with_name("pretrained_layers.json"), ("model", "part"), len(minilm_parts())) as rows:
            for row in traces_of_parts(minilm(), minilm_parts(), 16):
                rows.add(row, said=f"{row['part']}: {row['trace']:.3g} +- {row['trace_stderr']:.2g}")
        return
    with Rows(a.out, ("model",), len(a.models)) as rows:
        for name in a.models:
            rows.begin(name)
            with TemporaryDirectory() as folder:
                row = measure(name, Path(folder) / "run")
            rows.add(row, said=f"{name}: {row.get('failure') or row['sharpness']}")


if __name__ == "__main__":
    main()
