"""Measure one solver on one problem in a process of its own, and print the row as JSON.

The clock is the CPU time of the process. Products are timed one by one, so that what a solver spends around them is
known; the first, which builds the graph where one is kept, counts as set-up with what it costs above a later one.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.harness import Conditions, gradient, math_attention, one_line, peak_mebibytes
from benchmarks.common.problems import Problem
from benchmarks.common.trained import make_trained
from benchmarks.eigen.methods import EIGEN_METHODS, EigenMethod, Found, Meter, OutOfTime
from benchmarks.eigen.reference import plain_product, reference

__all__ = ["RIGHT", "EigenRow", "measure_eigen"]

WARM_UP = 3
CHECKED = 3
RIGHT = 1e-3
"""Relative error up to which eigenvalues are called right."""


@dataclass(frozen=True, kw_only=True)
class EigenRow(Conditions):
    """One measurement."""

    problem: str
    num_params: int
    k: int
    method: str
    label: str
    which: str
    """LA: the largest; LM: the largest in magnitude, compared with those."""
    products: int | None = None
    """Columns that were multiplied by the Hessian."""
    seconds: float | None = None
    """Of all: making the operator, its graph, the solver."""
    setup_seconds: float | None = None
    """Making the operator, and what the first product took longer than later ones."""
    solve_seconds: float | None = None
    """The rest."""
    product_seconds: float | None = None
    """Median over products, a column."""
    overhead: float | None = None
    """`solve_seconds` / (`products` x `product_seconds`)."""
    extra_mebibytes: float | None = None
    """Peak resident set, above that with gradients only."""
    residual: float | None = None
    """Largest |H u - theta u| / |theta|, with H by double backward in float64, over up to `CHECKED` pairs."""
    error: float | None = None
    """Largest |theta - lambda| / |lambda|, in order."""
    right: bool | None = None
    converged: bool | None = None
    """What the library says of itself; None where it says nothing."""
    said: str = ""
    reference_difference: float | None = None
    """Between two solvers, in the reference."""
    attention: str = "as in the model"
    failure: str | None = None
    """Why there are no figures."""


def measure_eigen(problem_name: str, k: int, method_name: str, *, limit: float = float("inf")) -> EigenRow:
    """Return the row of one method for k eigenpairs of one problem, with `failure` set if it cannot be had.

    Args:
        problem_name: one of `TRAINED`.
        k: how many pairs, at most what the reference has.
        method_name: one of `EIGEN_METHODS`.
        limit: seconds of CPU time after which the solver is stopped.
    """
    torch.set_num_threads(1)
    method, problem, truth = EIGEN_METHODS[method_name], make_trained(problem_name), reference(problem_name)
    expected = truth.eigenvalues(method.which)[:k]
    row = {"problem": problem_name, "num_params": problem.num_params, "k": k, "method": method_name}
    row |= {"label": method.label, "which": method.which, "reference_difference": truth.difference}
    try:
        method.load()
    except ImportError as error:
        return EigenRow(**row, failure=one_line(error))  # type: ignore[arg-type]
    for _ in range(WARM_UP):
        gradient(problem)
    peak = peak_mebibytes()
    solved = _solve(method, problem, k, expected, limit)
    if isinstance(solved, str):
        return EigenRow(**row, failure=solved)  # type: ignore[arg-type]
    found, meter, seconds, making, attention = solved
    extra = peak_mebibytes() - peak
    product = meter.product_seconds()
    columns, first = meter.calls[0]
    setup = making + max(0.0, first - columns * product)
    error_ = _error(found.values, expected)
    return EigenRow(
        **row,  # type: ignore[arg-type]
        products=meter.products,
        seconds=seconds,
        setup_seconds=setup,
        solve_seconds=seconds - setup,
        product_seconds=product,
        overhead=(seconds - setup) / (meter.products * product),
        extra_mebibytes=extra,
        residual=_residual(problem_name, found),
        error=error_,
        right=error_ <= RIGHT,
        converged=found.converged,
        said="" if found.converged else found.said,
        attention=attention,
    )


def _solve(
    method: EigenMethod, problem: Problem, k: int, expected: Tensor, limit: float
) -> tuple[Found, Meter, float, float, str] | str:
    """Return (what was found, the meter, seconds of all, seconds before the solver, which attention), or why not.

    A method that cannot differentiate the model's fused attention is given a second chance under the math kernel.
    """
    failure = ""
    for context, attention in ((contextlib.nullcontext, "as in the model"), (math_attention, "math kernel")):
        meter = Meter(limit=time.process_time() + limit)
        start = time.process_time()
        try:
            with context():
                solver = method.make(problem, k, meter, expected)
                making = time.process_time() - start
                found = solver()
        except OutOfTime:
            return f"stopped after {limit:.0f} s and {meter.products} products"
        except Exception as error:
            failure = failure or one_line(error)
            problem.model.zero_grad()
            continue
        seconds = time.process_time() - start
        return found, meter, seconds, making, f"{attention}; without it: {failure}" if failure else attention
    return failure


def _error(values: Tensor, expected: Tensor) -> float:
    values = values.detach().double()
    if len(values) < len(expected):
        return float("inf")
    order = values if bool((expected.diff() <= 0).all()) else values.abs()
    values = values[order.argsort(descending=True)]
    return float(((values - expected).abs() / expected.abs()).max())


def _residual(problem_name: str, found: Found) -> float:
    product = plain_product(make_trained(problem_name, dtype=torch.float64))
    residuals = []
    order = found.values.abs().argsort()
    places = order[torch.linspace(0, len(order) - 1, min(CHECKED, len(order))).long()]
    for value, u in zip(found.values[places].tolist(), found.vectors[:, places].detach().double().T, strict=True):
        residuals.append(float((product(u / u.norm()) - value * u / u.norm()).norm()) / abs(value))
    return max(residuals, default=float("inf"))
