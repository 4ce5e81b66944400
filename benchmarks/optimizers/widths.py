"""What a step of methods that precondition matrices costs at some widths, in steps of AdamW.

Their work on a matrix does not grow with the tokens of a batch, so these are named. A gradient is taken once a round
and handed to every method, so that what slows the machine down between two gradients is none of theirs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks.common.harness import one_line
from benchmarks.common.suite import Row
from benchmarks.optimizers.methods import method_of
from benchmarks.optimizers.problems import make_training

__all__ = ["width_rows"]

UNIT = "adamw"


def width_rows(
    problem_name: str,
    methods: Sequence[str],
    new_row: Callable[[str, str, str], Row],
    *,
    rounds: int,
    period: int = 10,
) -> list[Row]:
    """Return one row a method: a gradient and a step over a gradient and a step of AdamW.

    Steps of a round are as many as lie between two refreshes. Ratios are of the medians over rounds of the mean step of
    a round; the quartiles are those of its steps, with the median gradient.
    """
    rows = {name: new_row("width", problem_name, name) for name in methods}
    problem = make_training(problem_name)
    batch = problem.batch(torch.Generator().manual_seed(0))
    steppers = {}
    for name in (UNIT, *methods):
        params = [torch.nn.Parameter(p.detach().clone()) for p in problem.params]
        try:
            optimizer = method_of(name).make(params, 1e-9, problem.loss)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()  # which makes what it keeps
        except Exception as error:
            rows[name]["failure"] = one_line(error)
            continue
        steppers[name] = (params, optimizer)
    gradients: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        begin = time.process_time()
        found = torch.autograd.grad(problem.loss_of(batch), problem.params)
        gradients.append(time.process_time() - begin)
        for name, (params, optimizer) in steppers.items():
            for p, g in zip(params, found, strict=True):
                p.grad = g.clone()
            begin = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that gradients are those of the step before
                for _ in range(period):
                    optimizer.step()
            steps[name].append((time.process_time() - begin) / period)
    gradient = statistics.median(gradients)
    unit = gradient + statistics.median(steps[UNIT])
    for name in set(steps) - {UNIT}:
        quartiles = statistics.quantiles(steps[name], n=4) if rounds > 1 else steps[name] * 3
        low, middle, high = ((gradient + step) / unit for step in quartiles)
        rows[name] |= {"adamw_steps": middle, "quartiles": (low, high), "rounds": rounds, "adamw_seconds": unit}
    return list(rows.values())
