"""Newton's family beside L-BFGS, Adam and SciPy's methods: success, digits, cost in gradients, seconds.

`python -m benchmarks.bench_newton`. Published problems from published starts, an ill-conditioned logistic regression,
three differential equations by networks and an autoencoder's saddle. On one thread, in CPU seconds of the process, in
float64 but for the autoencoder.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.harness import git, one_line
from benchmarks.newton_autoencoder import AUTOENCODER_METHODS, autoencoder_facts
from benchmarks.newton_burgers import BURGERS
from benchmarks.newton_convection import CONVECTION
from benchmarks.newton_pinns import PLAIN, pinn_facts
from benchmarks.newton_poisson import POISSON
from benchmarks.processes import BARS, write_rows
from optimizers import minimize
from tests.optimizers.mgh import PROBLEMS
from tests.optimizers.nist import SETS, log_relative_error
from tests.optimizers.nist_larger import LARGER

__all__ = ["Row", "main"]

RESULTS = Path(__file__).parent / "results" / "newton.json"
GTOL, MOST_GRADIENTS = 1e-10, 1000
ALL_SETS = {**SETS, **LARGER}
OURS = ("newton-cg", "trust-region", "gltr", "cubic", "saddle-free")
SCIPY = ("Newton-CG", "trust-ncg", "trust-krylov")
PINNS = {"poisson": POISSON, "convection": CONVECTION, "burgers": BURGERS}
PINN_SEEDS = {
    "poisson": {"levenberg-marquardt": 10, PLAIN: 3, "torch L-BFGS": 3, "torch Adam": 3},
    "convection": {"levenberg-marquardt": 3, "torch L-BFGS": 2, "torch Adam": 1},
    "burgers": {"levenberg-marquardt": 3, "torch L-BFGS": 2, "torch Adam": 1},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one problem."""

    suite: str
    problem: str
    method: str
    loss: float | None = None
    """At the end; sums of squares for least squares, |u - u*| / |u*| for the differential equation."""
    digits: float | None = None
    """Right digits: of the parameters (curve fitting), of the loss above the minimum otherwise; 11 at most."""
    success: bool = False
    """6 digits of the parameters; within 1e-4 of a published minimum, 1e-9 absolute; gradient below 1e-8 (logistic);
    error below 1e-5 (poisson), 2e-2 (convection), 6.7e-4 (burgers); the saddle left (autoencoder)."""
    gradients: int | None = None
    """Gradients and products with Hessian or Jacobian, a product counted as one; a dense Jacobian as min(m, 2 n)."""
    seconds: float | None = None
    """CPU seconds of the process."""
    negative_curvature: int | None = None
    """Steps whose Krylov space held negative curvature (autoencoder)."""
    escaped: float | None = None
    """Seconds after which the saddle was behind (autoencoder)."""
    failure: str | None = None
    torch: str = str(torch.__version__)
    python: str = platform.python_version()
    git: str = "unknown"


Objective = Callable[[Tensor], Tensor]
Job = tuple[str, str, str, Callable[[], dict[str, Any]]]


class _Counted:
    """A scalar function of a vector for SciPy and torch, with counts."""

    def __init__(self, f: Objective) -> None:
        self.f, self.count = f, 0

    def value(self, x: np.ndarray) -> float:
        return float(self.f(torch.tensor(x)))

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self.count += 1
        t = torch.tensor(x, requires_grad=True)
        (g,) = torch.autograd.grad(self.f(t), t)
        return np.asarray(g.numpy())

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.count += 1
        t = torch.tensor(x, requires_grad=True)
        (g,) = torch.autograd.grad(self.f(t), t, create_graph=True)
        (Hv,) = torch.autograd.grad(g, t, torch.tensor(v))
        return np.asarray(Hv.numpy())


def _run(f: Objective, x0: Tensor, method: str) -> tuple[Tensor, int]:
    """Return the solution and the gradients spent."""
    if method in OURS:
        result = minimize(f, x0, method=method, gtol=GTOL, max_gradients=MOST_GRADIENTS)
        return result.x, result.njev + result.nhev
    counted = _Counted(f)
    if method in SCIPY:
        found = scipy.optimize.minimize(
            counted.value, x0.numpy(), jac=counted.gradient, hessp=counted.product, method=method,
            options={"xtol": 1e-14} if method == "Newton-CG" else {"gtol": GTOL},
        )  # fmt: skip
        return torch.tensor(found.x), counted.count
    x = x0.clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if method == "torch L-BFGS":
        optimizer = torch.optim.LBFGS(
            [x], max_iter=1000, max_eval=MOST_GRADIENTS, history_size=100, tolerance_grad=GTOL, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
    else:
        optimizer = torch.optim.Adam([x], lr=0.05)

    def closure() -> Tensor:
        counted.count += 1
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        return loss

    for _ in range(1 if method == "torch L-BFGS" else MOST_GRADIENTS):
        optimizer.step(closure)
    return x.detach(), counted.count


def _row(suite: str, problem: str, method: str, work: Callable[[], dict[str, Any]]) -> Row:
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = work()
    except Exception as error:
        return Row(suite=suite, problem=problem, method=method, failure=one_line(error), git=git())
    return Row(suite=suite, problem=problem, method=method, seconds=time.process_time() - begun, git=git(), **facts)


def _mgh(name: str, method: str) -> dict[str, Any]:
    problem = PROBLEMS[name]
    x0 = torch.tensor(problem.start, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return problem.residuals(x).square().sum()

    if method == "levenberg-marquardt":
        result = minimize(problem.residuals, x0, method=method, gtol=GTOL, ftol=1e-14, max_steps=1000)
        x, count = result.x, result.njev + result.nhev
    elif method == "least_squares":
        x, count = _least_squares(problem.residuals, x0)
    else:
        x, count = _run(f, x0, method)
    loss = float(f(x))
    gap = min(abs(loss - m) for m in problem.minima)
    success = any(abs(loss - m) <= 1e-4 * m + 1e-9 for m in problem.minima)
    return {"loss": loss, "digits": min(-math.log10(max(gap, 1e-11)), 11.0), "success": success, "gradients": count}


def _least_squares(residuals: Objective, x0: Tensor) -> tuple[Tensor, int]:
    found = scipy.optimize.least_squares(
        lambda x: residuals(torch.tensor(x)).numpy(),
        x0.numpy(),
        jac=lambda x: torch.autograd.functional.jacobian(residuals, torch.tensor(x)).numpy(),
        method="lm" if residuals(x0).numel() >= x0.numel() else "trf",
        x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=3000,
    )  # fmt: skip
    m, n = residuals(x0).numel(), x0.numel()
    return torch.tensor(found.x), int(found.njev) * min(m, 2 * n)


def _nist(name: str, start: int, method: str) -> dict[str, Any]:
    problem = ALL_SETS[name]
    x0 = torch.tensor(problem.starts[start], dtype=torch.float64)
    if method == "levenberg-marquardt":
        result = minimize(problem.residuals, x0, method=method, gtol=0.0, xtol=1e-13, max_steps=1000)
        x, count = result.x, result.njev + result.nhev
    elif method == "least_squares":
        x, count = _least_squares(problem.residuals, x0)
    else:
        x, count = _run(lambda b: problem.residuals(b).square().sum(), x0, method)
    digits = log_relative_error(x, problem.certified) if bool(x.isfinite().all()) else 0.0
    loss = float(problem.residuals(x).square().sum())
    return {"loss": loss, "digits": max(digits, 0.0), "success": digits >= 6, "gradients": count}


def _logistic(method: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=g, dtype=torch.float64) * torch.logspace(-3, 0, 30, dtype=torch.float64)
    y = (torch.rand(400, generator=g) < 0.5).double()

    def f(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y)

    w, count = _run(f, torch.zeros(30, dtype=torch.float64), method)
    best = minimize(f, w, method="trust-region", gtol=1e-13).fun
    gap = float(f(w)) - best
    largest = float(torch.func.grad(f)(w).abs().max())
    digits = min(-math.log10(max(gap, 1e-11)), 11.0)
    return {"loss": float(f(w)), "digits": digits, "success": largest < 1e-8, "gradients": count}


def _jobs(suites: list[str]) -> list[Job]:
    jobs: list[Job] = []
    scalar = (*OURS, *SCIPY, "torch L-BFGS", "torch Adam")
    squares = ("levenberg-marquardt", "least_squares")
    if "autoencoder" in suites:
        jobs += [
            ("autoencoder", f"seed {s}", f"{m}, lr {lr:g}", partial(autoencoder_facts, s, m, lr))
            for m, rates in AUTOENCODER_METHODS.items()
            for lr in rates
            for s in range(3 if lr == rates[0] else 1)
        ]
    jobs += [
        (name, f"seed {s}", m, partial(pinn_facts, PINNS[name], s, m))
        for name in PINNS
        if name in suites
        for m, seeds in PINN_SEEDS[name].items()
        for s in range(seeds)
    ]
    if "mgh" in suites:
        jobs += [("mgh", n, m, partial(_mgh, n, m)) for n in PROBLEMS for m in (*squares, *scalar)]
    if "nist" in suites:
        jobs += [
            (f"nist start {s + 1}", n, m, partial(_nist, n, s, m))
            for s in (0, 1)
            for n in ALL_SETS
            for m in (*squares, "torch L-BFGS")
        ]
    if "logistic" in suites:
        jobs += [("logistic", "columns from 1e-3 to 1", m, partial(_logistic, m)) for m in scalar]
    return jobs


def main() -> None:
    """Measure everything, or the suites that the command line names, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_newton")
    suites = ["autoencoder", *PINNS, "mgh", "nist", "logistic"]
    parser.add_argument("--suites", nargs="+", choices=suites, default=suites)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1, help="processes; each runs one job at a time")
    arguments = parser.parse_args()
    jobs, rows = _jobs(arguments.suites), []
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*BARS, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(
            arguments.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        for row in progress.track(pool.map(_row, *zip(*jobs, strict=True)), total=len(jobs), description="methods"):
            rows.append(asdict(row))
            write_rows(arguments.out, rows)  # a run that is cut short leaves what it has


if __name__ == "__main__":
    main()
