"""Which signal warns of a loss spike? AUROC of "a spike begins within 10 steps" over 40 seeded runs.

`python -m benchmarks.tracking.spikes [--tasks gpt cnn] [--seeds 20]`. Both recipes train with Adam, beta2 = 0.999 and
eps = 1e-8, at a rate that each seed draws log-uniformly:

- gpt: the bundled transformer on batches of 16 texts, 150 steps; a warm-up that is cut short: a twentieth of the rate
  until a step between 50 and 100 that the seed draws, then all of it (0.01 to 0.1);
- cnn: two convolutions without normalisation on 32 digits a step, 250 steps at one rate (0.005 to 0.03): as gradients
  shrink, so does what Adam divides by, and preconditioned sharpness crosses its threshold by itself.

A spike begins at a step where the loss on a fixed probe is above the median of the 20 steps before by 0.3 or more, an
absolute floor; the 20 steps from there on count neither as spikes nor as quiet. Signals are those at hand when the step
is taken: the preconditioned sharpness of the probe over its threshold, and of the training batch the norms of gradient
and update and the loss, each also over its median of the 20 steps before. Intervals are a bootstrap over runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis import CurvatureTracker
from analysis.tasks.digits import load_digits
from analysis.tasks.text import load_text, make_gpt
from analysis.training.spikes import spike_starts
from benchmarks.common.suite import RESULTS, Row, Rows, command
from curvature import Objective

__all__ = ["RECIPES", "SIGNALS", "auroc", "labels", "main", "rows_of", "spikes", "train"]

WINDOW, FLOOR, AHEAD, DRAWS = 20, 0.3, 10, 1000
SIGNALS = ("sharpness", "gradient", "update", "loss")
Run = dict[str, list[float]]


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def _digits() -> tuple[Tensor, Tensor]:
    return load_digits()[0]


def _text() -> tuple[Tensor, Tensor]:
    return load_text()[0]


RECIPES: dict[str, dict[str, Any]] = {
    "gpt": {"model": make_gpt, "data": _text, "batch": 16, "probe": 32, "steps": 150, "rates": (0.01, 0.1), "jump": 20},
    "cnn": {"model": _cnn, "data": _digits, "batch": 32, "probe": 128, "steps": 250, "rates": (0.005, 0.03), "jump": 1},
}


def train(recipe: str, seed: int, steps: int | None = None) -> Run:
    """Train by a recipe; return all signals and the loss on the probe, step by step."""
    r = RECIPES[recipe]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = r["model"]()
        x, y = r["data"]()
        low, high = map(math.log, r["rates"])
        lr = math.exp(low + (high - low) * float(torch.rand(())))
        late = int(torch.randint(50, 100, ())) if r["jump"] > 1 else 0
        probe = (x[-r["probe"] :], y[-r["probe"] :])
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
        objective = Objective(model, nn.CrossEntropyLoss(), probe)
        tracker = CurvatureTracker(objective, optimizer, quantities=("preconditioned",), budget=None, generator=seed)
        found: Run = {name: [] for name in (*SIGNALS, "probe")}
        for step in range(steps or r["steps"]):
            optimizer.param_groups[0]["lr"] = lr / r["jump"] if step < late else lr
            rows = torch.randint(len(x) - r["probe"], (r["batch"],))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
            optimizer.step()
            reading = tracker.step(loss)
            assert reading is not None
            values = (reading.stability, norm, reading.update_norm, float(loss.detach()), reading.loss)
            for name, value in zip((*SIGNALS, "probe"), values, strict=True):
                found[name].append(value)
        tracker.close()
    return found


def spikes(losses: Sequence[float]) -> list[int]:
    """Return the steps at which spikes begin."""
    return spike_starts(losses, WINDOW, FLOOR)


def labels(losses: Sequence[float]) -> list[int | None]:
    """Return for each step whether a spike begins within the next 10; None where it does not count.

    A step counts from the 20th on, outside of spikes, and where 10 steps follow. What is known at step t is the loss
    before its update, so a spike "within 10 steps" begins at t + 1 to t + 10.
    """
    begun = spikes(losses)
    inside = {step for begin in begun for step in range(begin, begin + WINDOW)}
    found: list[int | None] = []
    for step in range(len(losses)):
        counts = step >= WINDOW and step not in inside and step + AHEAD < len(losses)
        found.append(int(any(step < begin <= step + AHEAD for begin in begun)) if counts else None)
    return found


def auroc(scores: Sequence[float], truths: Sequence[int]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    ranks = [0.0] * len(scores)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and scores[order[j + 1]] == scores[order[i]]:
            j += 1
        for k in range(i, j + 1):
            ranks[order[k]] = (i + j) / 2 + 1
        i = j + 1
    positive = sum(truths)
    negative = len(truths) - positive
    if not positive or not negative:
        return math.nan
    total = sum(rank for rank, truth in zip(ranks, truths, strict=True) if truth)
    return (total - positive * (positive + 1) / 2) / (positive * negative)


def _relative(values: Sequence[float]) -> list[float]:
    """Return each value over the median of the 20 before it."""
    before = [statistics.median(values[max(0, i - WINDOW) : i]) if i else math.nan for i in range(len(values))]
    return [v / m if m > 0 else math.nan for v, m in zip(values, before, strict=True)]


def _scored(run: Run, signal: str, relative: bool) -> list[tuple[float, int]]:
    values = _relative(run[signal]) if relative else run[signal]
    pairs = zip(values, labels(run["probe"]), strict=True)
    return [(value, truth) for value, truth in pairs if truth is not None and math.isfinite(value)]


def rows_of(recipe: str, runs: Sequence[Run]) -> list[Row]:
    """Return a row for each signal, plain and relative."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(runs), (DRAWS, len(runs)), generator=generator).tolist()
    rows = []
    for signal in SIGNALS:
        for relative in (False, True):
            scored = [_scored(run, signal, relative) for run in runs]

            def over(chosen: Sequence[int], scored: list[list[tuple[float, int]]] = scored) -> float:
                pairs = [pair for i in chosen for pair in scored[i]]
                return auroc([value for value, _ in pairs], [truth for _, truth in pairs])

            again = sorted(value for value in map(over, draws) if value == value)
            rows.append(
                {
                    "task": recipe,
                    "signal": signal,
                    "relative": relative,
                    "auroc": over(range(len(runs))),
                    "low": again[int(0.025 * len(again))] if again else math.nan,
                    "high": again[int(0.975 * len(again))] if again else math.nan,
                    "runs": len(runs),
                    "runs_with_spikes": sum(bool(spikes(run["probe"])) for run in runs),
                    "spikes": sum(len(spikes(run["probe"])) for run in runs),
                    "steps": sum(map(len, scored)),
                    "positive": sum(truth for pairs in scored for _, truth in pairs),
                    **_leads(runs, signal),
                }
            )
    return rows


def _leads(runs: Sequence[Run], signal: str) -> Row:
    """Return, of sharpness alone, how many steps before each spike it came above its threshold, within 20."""
    if signal != "sharpness":
        return {}
    leads, quiet, above = [], 0, 0
    for run in runs:
        for begin in spikes(run["probe"]):
            over = [step for step in range(begin - WINDOW, begin) if run["sharpness"][step] > 1]
            leads.append(begin - over[0] if over else 0)
        truths = labels(run["probe"])
        quiet += sum(truth == 0 for truth in truths)
        above += sum(truth == 0 and ratio > 1 for truth, ratio in zip(truths, run["sharpness"], strict=True))
    return {"leads": sorted(leads), "share_above_when_quiet": above / max(quiet, 1)}


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("tracking", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.set_defaults(out=RESULTS / "spikes.json")
    a = parser.parse_args()
    make: Callable[[str, int], Run] = train
    with Rows(a.out, ("task", "signal", "relative"), len(a.tasks) * a.seeds) as rows:
        for task in a.tasks:
            runs = []
            for seed in range(a.seeds):
                rows.begin(f"{task} {seed}")
                runs.append(make(task, seed))
                rows.add(steps=1)
            found = rows_of(task, runs)
            said = "\n".join(
                f"{task} {r['signal']:10}{'over its median' if r['relative'] else '':16} {r['auroc']:.3f} "
                f"({r['low']:.3f} to {r['high']:.3f})"
                for r in found
            )
            rows.add(*found, said=f"{said}\n{found[0]}", steps=0)


if __name__ == "__main__":
    main()
