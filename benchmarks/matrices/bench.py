"""Optimizers that precondition matrices.

`python -m benchmarks.matrices.bench costs|runs|race [--problems ...] [--methods ...]`:

    costs   a step of a small GPT in steps of AdamW, factors measured and refreshed every tenth step: medians of the
            steps that do so and of the others, each beside a step of AdamW, put together nine to one
    runs    training runs of equal length, cosine over each, a small grid of learning rates with the first seed, the
            best one with further seeds; loss on training data, seconds of the process, gradients
    race    the same for all kinds of methods on all problems, five seeds, once with as many steps for each and once
            in the time that AdamW takes for twice as many; four learning rates each time, more where an end is best;
            K-FAC is left out where its layers are not called as such, under derivatives in a network's inputs

Widths name the tokens of a step: the overhead does not grow with these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F

from benchmarks.common.harness import Conditions, one_line
from benchmarks.common.problems import make_gpt
from benchmarks.common.suite import Row, Rows, command, stored
from benchmarks.matrices.methods import METHODS, OF_LAYERS, OF_PARTS, PERIOD, RACE
from benchmarks.matrices.problems import PINNS, PROBLEMS
from benchmarks.optimizers.bench import next_rate
from curvature.errors import CurvatureError

__all__ = ["COSTS", "METHODS", "PROBLEMS", "RUNS", "cost_row", "main", "race", "run_row"]

COSTS = {"width 128, 4096 tokens": (128, 64), "width 512, 8192 tokens": (512, 128)}
"""Width and sequences of 64 tokens."""
RUNS = ("gpt", "autoencoder")


COSTED = ("KFAC", "KFAC, every 10th", "EKFAC, every 10th")
"""Those that need a closure; `benchmarks.optimizers.bench widths` has the others."""


# -- costs ------------------------------------------------------------------------------------------------------------


def cost_row(name: str, method: str, *, rounds: int) -> Row:
    """Return the cost of a step in steps of AdamW: due, not due, and nine to one."""
    width, sequences = COSTS[name]
    torch.manual_seed(0)
    steps = {}
    text = torch.randint(65, (sequences, 65))
    batch = text[:, :-1].contiguous(), text[:, 1:].flatten()
    for who in ("AdamW", method):
        model = make_gpt(vocabulary=65, context=64, width=width, num_heads=4, num_layers=2)
        steps[who] = (model, METHODS[who][0].build(model, 1e-6, F.cross_entropy))
        steps[who][1](model, batch, 1.0, True)
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for due in (True, False):
            spent = {}
            for who, (model, step) in steps.items():
                start = time.process_time()
                step(model, batch, 1.0, due)
                spent[who] = time.process_time() - start
            ratios[due].append(spent[method] / spent["AdamW"])
    refreshing, other = (statistics.median(ratios[k]) for k in (True, False))
    row: Row = {"kind": "cost", "problem": name, "method": method, "due": refreshing, "other": other, "rounds": rounds}
    row |= {"adamw_steps": (refreshing + (PERIOD - 1) * other) / PERIOD}
    return row | asdict(Conditions())


# -- runs -------------------------------------------------------------------------------------------------------------


def run_row(problem: str, method: str, lr: float, *, seed: int, steps: int) -> Row:
    """Train once; `curve` has (steps, gradients, seconds of the process, loss), `failure` what stopped it."""
    task = PROBLEMS[problem](seed)
    step = {**METHODS, **RACE}[method][0].build(task.model, lr, task.loss)
    generator = torch.Generator().manual_seed(1000 + seed)
    gradients, spent, curve, failure = 0.0, 0.0, [], None
    for t in range(steps):
        batch = task.batch(generator)
        warm = min(1.0, (t + 1) / (3 if method.startswith("Gauss") else 10))
        factor = warm * (0.1 + 0.45 * (1 + math.cos(math.pi * t / steps)))
        start = time.process_time()
        try:
            gradients += step(task.model, batch, factor, None)
        except (CurvatureError, RuntimeError, NotImplementedError) as error:
            failure = one_line(error)
            break
        spent += time.process_time() - start
        if (t + 1) % max(1, steps // 20) == 0 or t + 1 == steps:
            with torch.no_grad():
                loss = float(task.loss(task.model(task.fixed[0]), task.fixed[1]))
            curve.append((t + 1, round(gradients, 1), round(spent, 2), float(f"{loss:.6g}")))
            if not math.isfinite(loss) or loss > 1e3 * max(1.0, curve[0][3]):
                break
    facts: Row = {"kind": "run", "problem": problem, "method": method, "lr": lr, "seed": seed, "steps": steps}
    if hasattr(task, "score") and failure is None:
        facts["error"] = float(f"{task.score():.6g}")
    return facts | {
        "loss": curve[-1][3] if failure is None and math.isfinite(curve[-1][3]) else None,
        "failure": failure,
        "gradients": gradients,
        "seconds": spent,
        "curve": [point for point in curve if math.isfinite(point[3])],
        **asdict(Conditions()),
    }


STEPS = {
    "gpt": 100,
    "digits-cnn": 100,
    "autoencoder": 200,
    "logistic": 100,
    "poisson": 100,
    "convection": 60,
    "burgers": 40,
}
"""Of the race: short runs, which say how methods start."""
FURTHER_RATES = 8
"""At most so many beyond the ends of the four: each is tuned to the end, wherever its four begin."""
LONGER = 2
"""The time of the race is that of AdamW's run, so many times as long."""


def race(problem: str, methods: list[str], *, seeds: int) -> Iterator[Row]:
    """Yield the rows of one problem, AdamW's first, whose seconds are the time of all."""
    steps = STEPS[problem]
    budget = math.nan
    for method in dict.fromkeys(("AdamW", *methods)):
        if problem in PINNS and method in (*OF_PARTS, *OF_LAYERS):  # all points are one example there
            continue
        tuned = yield from _tuned(problem, method, steps, seeds, "steps")
        if not tuned:
            continue
        pace = statistics.median(row["seconds"] / row["curve"][-1][0] for row in tuned)
        if method == "AdamW":
            budget = LONGER * steps * pace
        yield from _tuned(problem, method, max(1, round(budget / pace)), seeds, "time")


def _tuned(problem: str, method: str, steps: int, seeds: int, what: str) -> Generator[Row, None, list[Row]]:
    """Yield runs with the first seed at every rate, and with the others at the best; return those at the best."""
    found: dict[float, Row] = {}
    waiting = list(RACE[method][1])
    while waiting:
        lr = waiting.pop()
        found[lr] = run_row(problem, method, lr, seed=0, steps=steps) | {"kind": "race", "equal": what}
        yield found[lr]
        ended = [row for row in found.values() if row["loss"] is not None]
        if waiting or not ended or len(RACE[method][1]) == 1:
            continue
        best = min(ended, key=lambda row: row["loss"])["lr"]
        for end, up in ((min(found), False), (max(found), True)):
            if best == end and len(found) < len(RACE[method][1]) + FURTHER_RATES:
                waiting.append(next_rate(end, up=up))
    if not ended:
        return []
    chosen = [min(ended, key=lambda row: row["loss"])]
    for seed in range(1, seeds):
        row = run_row(problem, method, chosen[0]["lr"], seed=seed, steps=steps) | {"kind": "race", "equal": what}
        chosen.append(row)
        yield row
    return [row for row in chosen if row["curve"]]


def main() -> None:
    """Measure, write the rows, print them."""
    parser = command("matrices", __doc__)
    parser.add_argument("what", choices=["costs", "runs", "race"])
    parser.add_argument("--problems", nargs="+", default=None)
    parser.add_argument("--methods", nargs="+", choices=list({**METHODS, **RACE}), default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    a = parser.parse_args()
    if a.what == "costs":
        cases = [(p, m) for p in a.problems or COSTS for m in a.methods or COSTED]
        with Rows(a.out, ("kind", "problem", "method"), len(cases)) as rows:
            for problem, method in cases:
                row = cost_row(problem, method, rounds=a.rounds)
                parts = f"{row['adamw_steps']:5.2f} steps of AdamW ({row['due']:.2f} due, {row['other']:.2f} else)"
                rows.add(row, said=f"{problem:24s} {method:20s} {parts}")
        return
    if a.what == "race":
        with Rows(a.out, ("kind", "problem", "method", "lr", "seed", "equal"), 0) as rows:
            for problem in a.problems or PROBLEMS:
                for row in race(problem, a.methods or list(RACE), seeds=a.seeds):
                    rows.add(row, said=_line(row))
        return
    cases = [(p, m) for p in a.problems or RUNS for m in a.methods or METHODS]
    with Rows(a.out, ("kind", "problem", "method", "lr", "seed", "steps"), len(cases) * a.seeds) as rows:
        for problem, method in cases:
            found = {}
            for lr in METHODS[method][1]:
                found[lr] = run_row(problem, method, lr, seed=0, steps=a.steps)
                rows.add(found[lr], said=_line(found[lr]), steps=0)
            best = min(found, key=lambda lr: math.inf if found[lr]["loss"] is None else found[lr]["loss"])
            for seed in range(1, a.seeds):
                row = run_row(problem, method, best, seed=seed, steps=a.steps)
                rows.add(row, said=_line(row))
    print(len(stored(a.out)), "rows")


def _line(row: Row) -> str:
    facts = f"{row['problem']:12s} {row['method']:32s} lr {row['lr']:<7g} seed {row['seed']} steps {row['steps']}"
    if row["loss"] is None:
        return f"{facts}: {row['failure'] or 'diverged'}"
    return f"{facts}: loss {row['loss']:.4g}, {row['gradients']:.0f} gradients, {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
