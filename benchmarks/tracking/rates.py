"""The largest stable learning rate: `critical_learning_rate` beside a sweep, range tests, and estimates.

`python -m benchmarks.tracking.rates [--tasks ...] [--optimizers ...]`. Six tasks x three optimizers, trainings of 100
steps from fresh parameters. The sweep trains at every rate of a grid of factors of sqrt 2 over 13 octaves, upwards
beyond that where nothing was unstable yet, with three seeds that the tool does not use; its divergence point is the
geometric mean over seeds of where the largest stable rate and the next one of the grid lie. The rules of the range
tests are written from the source of pytorch-lr-finder 0.2 and Lightning 2.6, with their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis import LearningRatePlan, critical_learning_rate
from analysis.learning_rate.branches import Branches
from analysis.learning_rate.search import ends_of
from analysis.tasks.digits import half_squared_error, load_digits, untrained_tanh
from analysis.tasks.text import load_text, make_gpt
from analysis.training.loop import put_back, take_step
from benchmarks.common.suite import RESULTS, Row, Rows, command
from curvature import Objective

__all__ = ["OPTIMIZERS", "TASKS", "finished", "lightning_rule", "lr_finder_rule", "main", "rows_of", "sweep"]

STEPS, SWEPT_SEEDS, TOOL_SEEDS, RATIO = 100, 3, 3, math.sqrt(2)
OPTIMIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "sgd": ({"optimizer": "sgd"}, 2.0**-6),
    "momentum": ({"optimizer": "sgd", "momentum": 0.9}, 2.0**-8),
    "adam": ({"optimizer": "adam"}, 2.0**-11),
}
"""Name -> settings, and the smallest rate of the sweep."""
_PLACES = 26  # of the sweep, 13 octaves
Rule = Callable[[Sequence[float], Sequence[float]], float]


def _digits(model: Callable[[], nn.Module], *, targets: bool = True) -> Objective:
    (images, labels), _ = load_digits()
    x = images[:640]
    if targets:
        return Objective(model(), nn.CrossEntropyLoss(), (x, labels[:640]))
    return Objective(model(), nn.MSELoss(), (x.flatten(1), x.flatten(1)))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _deep() -> nn.Module:
    inner = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), *inner, nn.Linear(32, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(16, 10)),
    )


def _autoencoder() -> nn.Module:
    layers = [(64, 32), (32, 8), (8, 32)]
    return nn.Sequential(*(m for a, b in layers for m in (nn.Linear(a, b), nn.Tanh())), nn.Linear(32, 64))


def _tanh() -> Objective:
    model, data = untrained_tanh()
    return Objective(model, half_squared_error, data)


def _gpt() -> Objective:
    texts, _ = load_text()
    return Objective(make_gpt(), nn.CrossEntropyLoss(), (texts[0][:128], texts[1][:128]))


TASKS: dict[str, tuple[Callable[[], Objective], int | None]] = {
    "tanh": (_tanh, None),
    "mlp": (lambda: _digits(_mlp), 64),
    "deep": (lambda: _digits(_deep), 64),
    "cnn": (lambda: _digits(_cnn), 32),
    "autoencoder": (lambda: _digits(_autoencoder, targets=False), 64),
    "gpt": (_gpt, 16),
}
"""Name -> objective, and the batch size."""


# -- the sweep --------------------------------------------------------------------------------------------------------


def sweep(branches: Branches, lowest: float, steps: int, seeds: Sequence[int], places: int = _PLACES) -> Row:
    """Train at all rates; return where training diverges for each seed, the best rate, and the steps it took."""
    points, best, taken, spent = [], [], 0, len(branches.taken)
    for seed in seeds:
        losses: dict[int, float] = {}
        start, place = branches.start(seed), 0
        while True:
            losses[place] = branches.take(seed, lowest * RATIO**place, steps).loss
            place += 1
            ends = ends_of(losses, start)
            if place > places and ends is not None and ends.high is not None and ends.high < place - 2:
                break
        points.append(lowest * RATIO ** ((ends.low + (ends.high or 0)) / 2))
        best.append(lowest * RATIO**ends.best)
    taken = sum(branch.taken for branch in branches.taken[spent:])
    return {"points": points, "point": _mean(points), "swept_best": _mean(best), "sweep_steps": taken}


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


# -- range tests ------------------------------------------------------------------------------------------------------


def range_test(branches: Branches, rates: Sequence[float], seed: int) -> Iterator[tuple[float, float]]:
    """Yield (rate, loss of the batch) while the rate rises."""
    for lr, (optimizer, loss) in zip(rates, branches.steps(seed, rates[0], len(rates)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = float(take_step(optimizer, loss))
        yield lr, value
        if not math.isfinite(value):
            return


def lr_finder_rule(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the suggestion of pytorch-lr-finder: the steepest fall of the smoothed loss; NaN without one."""
    smooth: list[float] = []
    lowest = math.inf
    for loss in losses:
        smooth.append(loss if not smooth else 0.05 * loss + 0.95 * smooth[-1])
        lowest = min(lowest, smooth[-1])
        if not smooth[-1] <= 5 * lowest:
            break
    kept = np.asarray(smooth[10:-5])
    return rates[10 + int(np.gradient(kept).argmin())] if len(kept) > 1 else math.nan


def lightning_rule(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the suggestion of Lightning: the steepest fall, by rate, of the averaged loss; NaN without one."""
    smooth: list[float] = []
    average, lowest = 0.0, math.inf
    for step, loss in enumerate(losses, 1):
        average = 0.98 * average + 0.02 * loss
        smooth.append(average / (1 - 0.98 ** (step + 1)))  # one step more than is averaged, as there
        if step > 1 and not smooth[-1] <= 4 * lowest:
            break
        lowest = min(lowest, smooth[-1])
    kept = [(lr, loss) for lr, loss in zip(rates[10:], smooth[10:-1], strict=False) if math.isfinite(loss)]
    if len(kept) < 2:
        return math.nan
    lrs, values = (np.asarray(x) for x in zip(*kept, strict=True))
    return float(lrs[int(np.gradient(values, lrs).argmin())])


RULES: dict[str, tuple[list[float], Rule]] = {
    "pytorch-lr-finder": ([1e-7 * 1e8 ** (i / 99) for i in range(100)], lr_finder_rule),
    "Lightning": ([1e-8, *(1e-8 * 1e8 ** ((i + 1) / 100) for i in range(1, 100))], lightning_rule),
}
"""Name -> the rates of the range test, and what is chosen from its losses."""


# -- rows -------------------------------------------------------------------------------------------------------------


def rows_of(task: str, optimizer: str, *, steps: int = STEPS, places: int = _PLACES, seeds: int = TOOL_SEEDS) -> Row:
    """Measure a task with an optimizer by all ways."""
    make, batch_size = TASKS[task]
    settings, lowest = OPTIMIZERS[optimizer]
    plan = LearningRatePlan(steps=steps, seeds=seeds, batch_size=batch_size, fresh=True, warmup=False, **settings)
    objective = make()
    found = critical_learning_rate(objective, plan, generator=0)
    row: Row = {"task": task, "optimizer": optimizer, "lower": found.lower, "upper": found.upper}
    row |= {"seed_lower": list(found.seed_lower), "seed_upper": list(found.seed_upper)}
    row |= {"best": _mean(found.best), "best_lower": found.best_lower, "best_upper": found.best_upper}
    row |= {"tool_steps": found.num_steps, "branches": len(found.branches), "notes": list(found.notes)}
    row["guesses"] = {estimate.name: estimate.lr for estimate in found.estimates}
    with put_back(objective.model) as before, torch.random.fork_rng(devices=[]):
        objective.model.train()
        branches = Branches(
            objective,
            before,
            plan.make_optimizer,
            batch_size=batch_size,
            fresh=True,
            seed=0,
            draft=None,
            told=lambda _: None,
        )
        row |= sweep(branches, 2**0.25 * lowest, steps, [100 + i for i in range(SWEPT_SEEDS)], places)
        for name, (rates, rule) in RULES.items():
            seen = list(range_test(branches, rates, 100))
            row["guesses"][name] = rule([lr for lr, _ in seen], [loss for _, loss in seen])
    row["holds"] = row["lower"] <= row["point"] <= row["upper"]
    row["seeds_held"] = sum(row["lower"] <= point <= row["upper"] for point in row["points"])
    row["cost"] = row["tool_steps"] / row["sweep_steps"]
    return row


def finished(rows: list[Row]) -> list[Row]:
    """Add the constant guess: the geometric mean of the divergence points of the other tasks."""
    for row in rows:
        others = [r["point"] for r in rows if r["optimizer"] == row["optimizer"] and r["task"] != row["task"]]
        if others:
            row["guesses"]["constant"] = _mean(others)
    return rows


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("tracking", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.set_defaults(out=RESULTS / "rates.json")
    a = parser.parse_args()
    with Rows(a.out, ("task", "optimizer"), len(a.tasks) * len(a.optimizers), finish=finished) as rows:
        for task in a.tasks:
            for optimizer in a.optimizers:
                rows.begin(f"{task} {optimizer}")
                r = rows_of(task, optimizer)
                rows.add(
                    r,
                    said=f"{task:12}{optimizer:9} {r['lower']:.3g} to {r['upper']:.3g}, swept {r['point']:.3g} "
                    f"({min(r['points']):.3g} to {max(r['points']):.3g}) {'ok' if r['holds'] else 'MISSED'}, "
                    f"cost {r['cost']:.2f}, best {r['best']:.2g}, swept {r['swept_best']:.2g}",
                )


if __name__ == "__main__":
    main()
