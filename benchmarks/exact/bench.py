"""Exact diagonals by every route, in gradients of the same batch.

`python -m benchmarks.exact.bench`. Every measurement alternates with the gradient, so that whatever slows the machine
slows both, on the CPU time of the process, one thread. Unit products are n times the median of one product on a kept
graph: running them all would take hours and show the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common.harness import Conditions, gradient
from benchmarks.common.problems import Problem, make_problem
from benchmarks.common.suite import Rows, command
from curvature import GGNOperator, HessianOperator, Objective
from curvature.layerwise import exact_diagonal, kronecker_factors

__all__ = ["main", "row"]

PROBLEMS = ("mlp", "cnn")
SLOWER_THAN_A_ROUND = 60.0  # seconds; what takes longer is measured once


def row(problem: Problem, name: str, work: Callable[[], Any], *, rounds: int, factor: float = 1.0) -> dict[str, Any]:
    """Return seconds and gradients of some work, medians over rounds, each beside a gradient."""
    gradient(problem)
    work()
    ratios, seconds = [], []
    for _ in range(rounds):
        start = time.process_time()
        gradient(problem)
        middle = time.process_time()
        work()
        end = time.process_time()
        seconds.append((end - middle) * factor)
        ratios.append(factor * (end - middle) / (middle - start))
        if end - middle > SLOWER_THAN_A_ROUND:
            break
    return {
        "problem": problem.name,
        "num_params": problem.num_params,
        "examples": len(problem.inputs),
        "method": name,
        "gradients": statistics.median(ratios),
        "gradients_range": [min(ratios), max(ratios)],
        "seconds": statistics.median(seconds),
        "rounds": len(ratios),
        **asdict(Conditions()),
    }


def methods(problem: Problem, objective: Objective) -> dict[str, tuple[Callable[[], Any], float, int]]:
    """Return what is measured: name -> (work, what to multiply its time by, share of the rounds)."""
    g = torch.Generator().manual_seed(0)
    e = torch.zeros(problem.num_params)
    e[0] = 1
    ggn, hessian = GGNOperator(objective), HessianOperator(objective)
    return {
        "GGN diagonal": (lambda: exact_diagonal(objective), 1.0, 1),
        "GGN diagonal, vmap": (lambda: exact_diagonal(objective, route="vmap"), 1.0, 4),
        "GGN diagonal, n unit products": (lambda: ggn @ e, float(problem.num_params), 1),
        "GGN diagonal, one Monte Carlo sample": (lambda: exact_diagonal(objective, "ggn-mc", generator=g), 1.0, 1),
        "Hessian diagonal": (lambda: exact_diagonal(objective, "hessian"), 1.0, 4),
        "Hessian diagonal, n unit products": (lambda: hessian @ e, float(problem.num_params), 1),
        "KFLR": (lambda: kronecker_factors(objective), 1.0, 1),
        "KFAC, one sample": (lambda: kronecker_factors(objective, "kfac", generator=g), 1.0, 1),
    }


def main() -> None:
    """Measure, write the rows, print them."""
    parser = command("exact", __doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    a = parser.parse_args()
    problems = [make_problem(name) for name in a.problems]
    objectives = [Objective(problem.model, problem.loss, (problem.inputs, problem.targets)) for problem in problems]
    cases = [(p, *case) for p, o in zip(problems, objectives, strict=True) for case in methods(p, o).items()]
    with Rows(a.out, ("problem", "method"), len(cases)) as rows:
        for problem, method, (work, factor, share) in cases:
            found = row(problem, method, work, rounds=max(2, a.rounds // share), factor=factor)
            cost = f"{found['gradients']:12,.1f} gradients ({found['rounds']} rounds)"
            rows.add(found, said=f"{problem.name:5s} {method:50s} {cost}")


if __name__ == "__main__":
    main()
