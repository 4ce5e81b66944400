"""Traces, diagonals and outer eigenvalues by random products, all libraries in one run, at equal numbers of products.

`python -m benchmarks.estimators.bench`. Errors are those of several seeds against exact values; products are counted,
seconds are CPU time of one thread, the operator's own set-up left out. A second part asks for the trace to one per
cent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.common.harness import Conditions, one_line
from benchmarks.common.peers import Operator
from benchmarks.common.problems import Problem
from benchmarks.common.suite import Row, Rows, command
from benchmarks.eigen.methods import Meter, OutOfTime
from benchmarks.estimators.methods import BLOCK, ESTIMATORS, PAIRS, Estimator, Quantity
from benchmarks.estimators.reference import ESTIMATED, exact_diagonal, make_estimated, outer_eigenvalues

__all__ = ["distance", "exact", "main", "measure_estimator", "to_one_per_cent"]

TO_ACCURACY = "to-1-%"
PRODUCTS = {"digits-mlp": (30, 120), "digits-cnn": (60,)}
SEEDS = {"digits-mlp": 20, "digits-cnn": 3}
ACCURACY_SEEDS = {"auto": 3, "hutchinson": 1}  # thousands of products, a number that hardly varies
ACCURACY = 0.01
MOST_PRODUCTS = 100_000
WARM_UP = 24  # products; every method can do with as many
QUANTITIES: tuple[Quantity, ...] = ("trace", "diagonal", "pairs", "ggn-pairs")


def measure_estimator(
    problem: Problem, truth: Tensor, estimator: Estimator, num_matvecs: int, *, seeds: int, limit: float = float("inf")
) -> Row:
    """Return the row of one estimator, with `failure` set if there is no answer.

    Args:
        problem: whose Hessian, or Gauss-Newton matrix.
        truth: what it should find; see `exact`.
        estimator: one of `ESTIMATORS`.
        num_matvecs: products it is told to spend.
        seeds: repetitions.
        limit: seconds of CPU time after which it is stopped.
    """
    row: Row = {"problem": problem.name, "num_params": problem.num_params, "quantity": estimator.quantity}
    row |= {"method": estimator.name, "label": estimator.label, "ours": estimator.ours, "budget": num_matvecs}
    row |= {"seeds": seeds, "failure": None, **asdict(Conditions())}
    operator: Operator = "ggn" if estimator.quantity == "ggn-pairs" else "hessian"
    meter = Meter(limit=time.process_time() + limit)
    errors, stated, seconds, counts = [], [], [], []
    try:
        A = estimator.make(problem, operator, meter)
        estimator.estimate(A, min(num_matvecs, WARM_UP), 0)  # builds the graph, where one is kept
        first = meter.products
        for seed in range(seeds):
            before, start = meter.products, time.process_time()
            answer = estimator.estimate(A, num_matvecs, seed)
            seconds.append(time.process_time() - start)
            counts.append(meter.products - before)
            errors.append(distance(answer.values, truth, estimator.quantity))
            stated.append(answer.stated)
    except OutOfTime:
        return row | {"failure": f"stopped after {limit:.0f} s and {meter.products} products"}
    except Exception as error:
        problem.model.zero_grad()
        return row | {"failure": one_line(error)}
    assert first > 0
    found = torch.tensor(errors, dtype=torch.float64)
    scale = 1.0 if estimator.quantity.endswith("pairs") else float(truth.norm())
    said = (
        None if None in stated else float(torch.tensor(cast("list[float]", stated), dtype=torch.float64).mean()) / scale
    )
    return row | {
        "products": sum(counts) / seeds,
        "error": float(found.square().mean().sqrt()),
        "error_largest": float(found.max()),
        "stated": said,
        "seconds": float(torch.tensor(seconds, dtype=torch.float64).median()),
        "product_seconds": meter.product_seconds(),
    }


def exact(problem_name: str, quantity: Quantity) -> Tensor:
    """Return the exact trace (), diagonal (n,) or outer eigenvalues (k,), float64."""
    if quantity.endswith("pairs"):
        operator: Operator = "ggn" if quantity == "ggn-pairs" else "hessian"
        return outer_eigenvalues(make_estimated(problem_name, dtype=torch.float64), operator, PAIRS)
    diagonal = exact_diagonal(make_estimated(problem_name))
    return diagonal.sum() if quantity == "trace" else diagonal


def distance(values: Tensor, truth: Tensor, quantity: Quantity) -> float:
    """Return |values - truth| / |truth|; of eigenvalues, matched by magnitude, the largest of each one's own."""
    values = values.detach().double().cpu()
    if not quantity.endswith("pairs"):
        return float((values - truth).norm() / truth.norm())
    if len(values) < len(truth):
        return float("inf")
    values = values[values.abs().argsort(descending=True)][: len(truth)]
    return float(((values - truth).abs() / truth.abs()).max())


def to_one_per_cent(problem: Problem, truth: Tensor, method: Any, *, seeds: int) -> Row:
    """Return the row of our trace to an accuracy, by "auto" or plain "hutchinson": products, averaged over seeds.

    The half width of the 95 % interval is to be 1 % of the value.
    """
    from curvature import HessianOperator, Objective
    from curvature.linalg import trace

    A = HessianOperator(Objective(problem.model, problem.loss, (problem.inputs, problem.targets)))
    products, errors, seconds = [], [], []
    for seed in range(seeds):
        start, generator = time.process_time(), torch.Generator().manual_seed(seed)
        found = trace(A, method=method, rtol=ACCURACY, generator=generator, block_size=BLOCK, max_matvecs=MOST_PRODUCTS)
        seconds.append(time.process_time() - start)
        products.append(found.raise_if_failed().num_matvecs)
        errors.append(distance(found.value, truth, "trace"))
    label = "`trace`" if method == "auto" else "plain Hutchinson"
    row: Row = {"problem": problem.name, "num_params": problem.num_params, "quantity": "trace to 1 %"}
    row |= {"method": f"ours-{method}", "label": label, "ours": True, "seeds": seeds, "failure": None}
    return row | {
        "products": sum(products) / seeds,
        "error": float(torch.tensor(errors).square().mean().sqrt()),
        "error_largest": max(errors),
        "seconds": sum(seconds) / seeds,
        **asdict(Conditions()),
    }


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in the order of problems, estimators and budgets."""
    order = [*ESTIMATORS, *(("trace to 1 %", f"ours-{method}") for method in ACCURACY_SEEDS)]

    def place(row: Row) -> tuple[int, int, int]:
        of_method = order.index((row["quantity"], row["method"]))
        return list(ESTIMATED).index(row["problem"]), of_method, row.get("budget", 0)

    return sorted(rows, key=place)


def _summary(row: Row) -> str:
    what = f"{row['problem']:10} {row['quantity']:12} {row.get('budget', ''):>4} {row['method']:28}"
    if row["failure"]:
        return f"{what} {row['failure']}"
    said = "" if row.get("stated") is None else f", states {row['stated']:.1e}"
    return f"{what} {row['products']:6.0f} products {row['seconds']:7.2f} s, error {row['error']:.1e}{said}"


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("estimators", __doc__)
    quantities = [*QUANTITIES, TO_ACCURACY]
    parser.add_argument("--problems", nargs="+", choices=ESTIMATED, default=list(ESTIMATED))
    parser.add_argument("--quantities", nargs="+", choices=quantities, default=quantities)
    parser.add_argument("--methods", nargs="+", help="names, such as ours-auto; by default all")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds after which an estimator is stopped")
    a = parser.parse_args()
    cases = [(p, e) for p in a.problems for e in ESTIMATORS.values() if e.quantity in a.quantities]
    cases = [(p, e) for p, e in cases if a.methods is None or e.name in a.methods]
    with Rows(a.out, ("problem", "quantity", "method", "budget"), len(cases), finish=in_order) as rows:
        for name, estimator in cases:
            rows.begin(f"{name} {estimator.quantity} {estimator.name}")
            truth = exact(name, estimator.quantity)
            for budget in PRODUCTS[name]:
                problem = make_estimated(name)
                row = measure_estimator(problem, truth, estimator, budget, seeds=SEEDS[name], limit=a.limit)
                rows.add(row, said=_summary(row), steps=budget == PRODUCTS[name][-1])
        if TO_ACCURACY in a.quantities:
            for name in a.problems:
                for method, seeds in ACCURACY_SEEDS.items():
                    row = to_one_per_cent(make_estimated(name), exact(name, "trace"), method, seeds=seeds)
                    rows.add(row, said=_summary(row), steps=0)


if __name__ == "__main__":
    main()
