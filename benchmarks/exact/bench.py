"""Exact diagonals by every route, in gradients of the same batch.

`python -m benchmarks.exact.bench`. Every measurement alternates with the gradient, so that whatever slows the machine
slows both, on the CPU time of the process, one thread. Unit products are n times the median of one product on a kept
graph: running them all would take hours and show the same.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

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


def backpack_diagonal(problem: Problem) -> Callable[[], Tensor]:
    """Return the Gauss-Newton diagonal by BackPACK, (n,); in float64 it is what errors are taken against."""
    import backpack
    from backpack.extensions import DiagGGNExact

    model, loss = backpack.extend(copy.deepcopy(problem.model)), backpack.extend(copy.deepcopy(problem.loss))

    def diagonal() -> Tensor:
        with backpack.backpack(DiagGGNExact()):
            loss(model(problem.inputs), problem.targets).backward()
        return torch.cat([p.diag_ggn_exact.reshape(-1) for p in model.parameters()])

    return diagonal


def methods(problem: Problem, objective: Objective) -> dict[str, tuple[Callable[[], Any], float, int]]:
    """Return what is measured: name -> (work, what to multiply its time by, share of the rounds)."""
    g = torch.Generator().manual_seed(0)
    e = torch.zeros(problem.num_params)
    e[0] = 1
    ggn, hessian = GGNOperator(objective), HessianOperator(objective)
    return {
        "GGN diagonal": (lambda: exact_diagonal(objective).value, 1.0, 1),
        "GGN diagonal, BackPACK 1.7.1": (backpack_diagonal(problem), 1.0, 2),
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
    parser.add_argument("--methods", nargs="+", help="default: all")
    a = parser.parse_args()
    problems = [make_problem(name) for name in a.problems]
    objectives = [Objective(problem.model, problem.loss, (problem.inputs, problem.targets)) for problem in problems]
    cases = [(p, *case) for p, o in zip(problems, objectives, strict=True) for case in methods(p, o).items()]
    cases = [case for case in cases if a.methods is None or case[1] in a.methods]
    with Rows(a.out, ("problem", "method"), len(cases)) as rows:
        for problem, method, (work, factor, share) in cases:
            found = row(problem, method, work, rounds=max(2, a.rounds // share), factor=factor)
            if method.split(",")[0] == "GGN diagonal" and factor == 1.0 and isinstance(value := work(), Tensor):
                exact = make_problem(problem.name, dtype=torch.float64)
                torch.set_default_dtype(torch.float64)  # BackPACK makes tensors of it
                expected = backpack_diagonal(exact)()
                torch.set_default_dtype(torch.float32)
                found["error"] = float((value.double() - expected).norm() / expected.norm())
            cost = f"{found['gradients']:12,.1f} gradients ({found['rounds']} rounds)"
            rows.add(found, said=f"{problem.name:5s} {method:50s} {cost}")


if __name__ == "__main__":
    main()
