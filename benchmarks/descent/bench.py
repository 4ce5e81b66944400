"""Where does double descent show, and does it stand out beyond chance? And what do stacks of networks save?

    python -m benchmarks.descent.bench [--cases ...] [--out FILE]      rows to results/descent.json

Each curve is one call of `analysis.double_descent`: the threshold, the peaks of test loss and test error in standard
errors over repeats, and what curvature does beside them. "stack" compares the training of five networks side by side
with that of one after the other, as a ratio within one run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from analysis import DescentCurve, double_descent
from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.generalization.width import at_width
from analysis.tasks import load_task
from analysis.tasks.digits import make_cnn, make_mlp
from benchmarks.common.suite import Row, Rows, command

__all__ = ["CASES", "curve_row", "descent_table", "main", "stack_row"]

CASES: dict[str, dict[str, Any]] = {
    "digits, random features": {"task": "digits-mlp", "model": "random-features", "samples": 200, "repeats": 20},
    "digits, width": {"task": "digits-mlp", "vary": "width"},
    "digits, width, squared": {"task": "digits-mlp", "vary": "width", "loss": "squared"},
    "digits, width, no noise": {"task": "digits-mlp", "vary": "width", "label_noise": 0.0},
    "digits, samples": {"task": "digits-mlp", "vary": "samples", "curvature": False},
    "digits, epochs": {"task": "digits-mlp", "vary": "epochs", "width": 32},
    "sequences, width": {"task": "mnist1d-mlp", "vary": "width"},
}
STACKS = {"mlp 8": (make_mlp, 8), "mlp 64": (make_mlp, 64), "cnn 4": (make_cnn, 4)}


def curve_row(name: str, **smaller: Any) -> Row:
    """Return what a curve says."""
    settings = {**CASES[name], **smaller}
    task = load_task(settings.pop("task"))
    begin = time.perf_counter()
    found = double_descent(task.objective(), generator=0, test_data=task.test_data, **settings)
    return {
        "case": name,
        "settings": {**CASES[name], **smaller},
        **_said(found),
        "seconds": time.perf_counter() - begin,
    }


def _said(found: DescentCurve) -> Row:
    row: Row = {"values": found.values.tolist(), "threshold": [found.threshold.lower, found.threshold.upper]}
    for name in ("test_loss", "test_error"):
        peak = found.peak(name)
        row[f"{name}_peak"] = None if peak is None else peak.value
        row[f"{name}_standing"] = None if peak is None else peak.standing
        row[name] = found.mean(name)[0].tolist()
    for name in ("train_error", "effective_dimension", "condition"):
        if np.isfinite(found.of(name)).any():  # NaN: not measured
            row[name] = found.mean(name)[0].tolist()
    if found.model != "task":
        off = found.of("simulated") / found.of("expected") - 1
        z = off.mean(1) / (off.std(1, ddof=1) / math.sqrt(off.shape[1]))
        row["closed_form_z"] = float(abs(z).max())
    return row


def stack_row(name: str, steps: int = 200, members: int = 5) -> Row:
    """Return what training side by side takes of the time of one after the other."""
    make, width = STACKS[name]
    model = at_width(make(), width)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 1, 8, 8, generator=g), torch.randint(0, 10, (members, 300), generator=g)
    recipe = Recipe(steps=steps, lr=0.01)
    together = Ensemble(model, range(members))
    together.train(F.cross_entropy, x, y, Recipe(steps=5, lr=0.01))
    begin = time.process_time()
    together.train(F.cross_entropy, x, y, recipe)
    stacked = time.process_time() - begin
    alone = 0.0
    for i in range(members):
        net = Ensemble(model, [i]).member(0).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
        begin = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y[i]).backward()
            optimizer.step()
        alone += time.process_time() - begin
    return {
        "case": f"stack, {name}",
        "members": members,
        "ms_per_step": 1000 * stacked / steps,
        "ratio": stacked / alone,
    }


def descent_table(rows: Sequence[Row]) -> str:
    """Return the table of curves."""
    lines = [
        "| curve | threshold | peak of the test loss | of the test error | least test error |",
        "|---|---|---|---|---|",
    ]
    for row in (r for case in CASES for r in rows if r["case"] == case):
        along = row["settings"].get("vary", "width")
        along = "features" if row["settings"].get("model") == "random-features" else along
        peaks = []
        for name in ("test_loss", "test_error"):
            place, standing = row[f"{name}_peak"], row[f"{name}_standing"]
            peaks.append("none" if place is None else f"{place:g}, {standing:.1f} standard errors")
        least = min(range(len(row["values"])), key=lambda i: row["test_error"][i])
        ends = " to ".join(f"{x:g}" for x in row["threshold"])
        told = f"{100 * row['test_error'][least]:.1f} % at {row['values'][least]:g}"
        lines.append(f"| {row['case']} | {ends} {along} | {' | '.join(peaks)} | {told} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure the cases asked for."""
    parser = command("descent", __doc__)
    every = [*CASES, *(f"stack, {name}" for name in STACKS)]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    asked = parser.parse_args()
    with Rows(asked.out, ("case",), len(asked.cases)) as rows:
        for case in asked.cases:
            rows.begin(case)
            row = curve_row(case) if case in CASES else stack_row(case.removeprefix("stack, "))
            said = f"{row['ratio']:.2f} of the time" if "ratio" in row else f"peak at {row['test_loss_peak']}"
            rows.add(row, said=f"{case}: {said}")
    Console().print(f"rows in {asked.out}", highlight=False)


if __name__ == "__main__":
    main()
