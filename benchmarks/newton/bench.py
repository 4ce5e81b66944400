"""Newton's family beside L-BFGS, Adam and SciPy's methods: success, digits, cost in gradients, seconds.

`python -m benchmarks.newton.bench`. Published problems from published starts, an ill-conditioned logistic regression,
three differential equations by networks and an autoencoder's saddle. On one thread, in CPU seconds of the process, in
float64 but for the autoencoder.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.harness import one_line
from benchmarks.common.processes import in_parallel
from benchmarks.common.suite import Rows, command
from benchmarks.newton.autoencoder import AUTOENCODER_METHODS, autoencoder_facts
from benchmarks.newton.burgers import BURGERS
from benchmarks.newton.convection import CONVECTION
from benchmarks.newton.pinns import PLAIN, pinn_facts
from benchmarks.newton.poisson import POISSON
from optimizers import minimize
from tests.optimizers.nist import SETS, log_relative_error
from tests.optimizers.nist_larger import LARGER
from tests.optimizers.published import PUBLISHED

__all__ = ["Row", "main"]

GTOL, MOST_GRADIENTS, MOST_PUBLISHED = 1e-10, 1000, 5000
ALL_SETS = {**SETS, **LARGER}
OURS = ("newton-cg", "hessian-free", "trust-region", "gltr", "cubic", "saddle-free")
SCIPY = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-exact")
PINNS = {"poisson": POISSON, "convection": CONVECTION, "burgers": BURGERS}
SUITES = ("autoencoder", *PINNS, "published", "nist", "logistic")
_NATURAL = ("energy natural gradient", "energy natural gradient, rank 100", "spring")
PINN_SEEDS = {
    "poisson": {
        "levenberg-marquardt": 10,
        **dict.fromkeys((PLAIN, "ss-broyden", "bfgs", *_NATURAL, "torch L-BFGS", "torch Adam"), 3),
    },
    "convection": {
        **dict.fromkeys(("levenberg-marquardt", "ss-broyden", "energy natural gradient"), 3),
        **{"torch L-BFGS": 2, "torch Adam": 1},
    },
    "burgers": {"ss-broyden": 3, "levenberg-marquardt": 1, "torch L-BFGS": 1},
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
    """6 digits of the parameters; within 1e-4 of a known minimum, 1e-9 absolute; gradient below 1e-8 (logistic);
    error below 1e-5 (poisson), 2e-2 (convection), 6.7e-4 (burgers); the saddle left (autoencoder)."""
    claimed: bool | None = None
    """Whether the method itself said that it converged (published)."""
    stationary: bool | None = None
    """Gradient below 1e-4 (1 + |loss|), no curvature below -1e-6 of the largest, by dense derivatives (published)."""
    gradients: int | None = None
    """Gradients and products with Hessian or Jacobian, a product counted as one; a dense Jacobian as min(m, 2 n)."""
    seconds: float | None = None
    """CPU seconds of the process."""
    negative_curvature: int | None = None
    """Steps whose Krylov space held negative curvature (autoencoder)."""
    escaped: float | None = None
    """Seconds after which the saddle was behind (autoencoder)."""
    failure: str | None = None


Objective = Callable[[Tensor], Tensor]
Job = tuple[str, str, str, Callable[[], dict[str, Any]]]


class _SpentError(Exception):
    """The budget of gradients is spent."""


class _Counted:
    """A scalar function of a vector for SciPy and torch, with counts and a budget."""

    def __init__(self, f: Objective, budget: int) -> None:
        self.f, self.count, self.budget = f, 0, budget
        self.x: np.ndarray | None = None

    def _spend(self, number: int = 1) -> None:
        if self.count + number > self.budget:
            raise _SpentError
        self.count += number

    def value(self, x: np.ndarray) -> float:
        return float(self.f(torch.tensor(x)))

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self._spend()
        self.x = x.copy()
        t = torch.tensor(x, requires_grad=True)
        (g,) = torch.autograd.grad(self.f(t), t)
        return np.asarray(g.numpy())

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self._spend()
        t = torch.tensor(x, requires_grad=True)
        (g,) = torch.autograd.grad(self.f(t), t, create_graph=True)
        (Hv,) = torch.autograd.grad(g, t, torch.tensor(v))
        return np.asarray(Hv.numpy())

    def hessian(self, x: np.ndarray) -> np.ndarray:
        self._spend(len(x))
        return np.asarray(torch.autograd.functional.hessian(self.f, torch.tensor(x)).numpy())


def _run(f: Objective, x0: Tensor, method: str, budget: int = MOST_GRADIENTS) -> tuple[Tensor, int, bool]:
    """Return the solution, the gradients spent, and whether the method said that it converged."""
    if method in OURS:
        result = minimize(f, x0, method=method, gtol=GTOL, max_gradients=budget, max_steps=budget)
        return result.x, result.njev + result.nhev, result.success
    counted = _Counted(f, budget)
    if method in SCIPY:
        second = {"hess": counted.hessian} if method == "trust-exact" else {"hessp": counted.product}
        tolerance = {"xtol": 1e-14} if method == "Newton-CG" else {"gtol": GTOL}
        try:
            found = scipy.optimize.minimize(
                counted.value, x0.numpy(), jac=counted.gradient, method=method,
                options={**tolerance, "maxiter": 10 * budget}, **second,
            )  # fmt: skip
        except _SpentError:
            return x0 if counted.x is None else torch.tensor(counted.x), counted.count, False
        return torch.tensor(found.x), counted.count, bool(found.success)
    x = x0.clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if method == "torch L-BFGS":
        optimizer = torch.optim.LBFGS(
            [x], max_iter=budget, max_eval=budget, history_size=100, tolerance_grad=GTOL, tolerance_change=0.0,
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

    for _ in range(1 if method == "torch L-BFGS" else budget):
        optimizer.step(closure)
    return x.detach(), counted.count, x.grad is not None and float(x.grad.abs().max()) <= GTOL


def _row(suite: str, problem: str, method: str, work: Callable[[], dict[str, Any]]) -> Row:
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = work()
    except Exception as error:
        return Row(suite=suite, problem=problem, method=method, failure=one_line(error))
    return Row(suite=suite, problem=problem, method=method, seconds=time.process_time() - begun, **facts)


def _published(name: str, method: str) -> dict[str, Any]:
    problem = PUBLISHED[name]
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    if method == "levenberg-marquardt":
        assert problem.residuals is not None
        result = minimize(
            problem.residuals, x0, method=method, gtol=GTOL, ftol=1e-14, max_steps=MOST_PUBLISHED,
            max_gradients=MOST_PUBLISHED,
        )  # fmt: skip
        x, count, claimed = result.x, result.njev + result.nhev, result.success
    elif method == "least_squares":
        assert problem.residuals is not None
        x, count, claimed = _least_squares(problem.residuals, x0, MOST_PUBLISHED)
    else:
        x, count, claimed = _run(problem.value, x0, method, MOST_PUBLISHED)
    loss = float(problem.value(x))
    gap = min(abs(loss - m) for m in problem.minima)
    success = any(abs(loss - m) <= 1e-4 * abs(m) + 1e-9 for m in problem.minima)
    return {
        "loss": loss,
        "digits": min(-math.log10(max(gap, 1e-11)), 11.0),
        "success": success,
        "claimed": claimed,
        "stationary": stationary(problem.value, x),
        "gradients": count,
    }


def stationary(f: Objective, x: Tensor) -> bool:
    """Whether x is a minimum to second order, by dense derivatives."""
    g = torch.func.grad(f)(x)
    H = torch.autograd.functional.hessian(f, x)
    if not bool(g.isfinite().all() and H.isfinite().all()):
        return False
    curvatures = torch.linalg.eigvalsh(H)
    flat = float(curvatures[0]) >= -1e-6 * float(curvatures.abs().max())
    return flat and float(g.abs().max()) <= 1e-4 * (1 + abs(float(f(x))))


def _least_squares(residuals: Objective, x0: Tensor, budget: int = 3000) -> tuple[Tensor, int, bool]:
    found = scipy.optimize.least_squares(
        lambda x: residuals(torch.tensor(x)).numpy(),
        x0.numpy(),
        jac=lambda x: torch.autograd.functional.jacobian(residuals, torch.tensor(x)).numpy(),
        method="lm" if residuals(x0).numel() >= x0.numel() else "trf",
        x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=budget,
    )  # fmt: skip
    m, n = residuals(x0).numel(), x0.numel()
    return torch.tensor(found.x), int(found.njev) * min(m, 2 * n), bool(found.success)


def _nist(name: str, start: int, method: str) -> dict[str, Any]:
    problem = ALL_SETS[name]
    x0 = torch.tensor(problem.starts[start], dtype=torch.float64)
    if method == "levenberg-marquardt":
        result = minimize(problem.residuals, x0, method=method, gtol=0.0, xtol=1e-13, max_steps=1000)
        x, count = result.x, result.njev + result.nhev
    elif method == "least_squares":
        x, count, _ = _least_squares(problem.residuals, x0)
    else:
        x, count, _ = _run(lambda b: problem.residuals(b).square().sum(), x0, method)
    digits = log_relative_error(x, problem.certified) if bool(x.isfinite().all()) else 0.0
    loss = float(problem.residuals(x).square().sum())
    return {"loss": loss, "digits": max(digits, 0.0), "success": digits >= 6, "gradients": count}


def _logistic(method: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=g, dtype=torch.float64) * torch.logspace(-3, 0, 30, dtype=torch.float64)
    y = (torch.rand(400, generator=g) < 0.5).double()

    def f(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y)

    w, count, _ = _run(f, torch.zeros(30, dtype=torch.float64), method)
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
    if "published" in suites:
        jobs += [
            ("published", name, m, partial(_published, name, m))
            for name, problem in PUBLISHED.items()
            for m in ((*squares, *scalar[:-1]) if problem.residuals else scalar[:-1])
        ]
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
    """Measure everything, or what the command line names, and write the rows."""
    parser = command("newton", __doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--problems", nargs="+", help="names; by default all")
    parser.add_argument("--methods", nargs="+", help="names; by default all")
    parser.add_argument("--processes", type=int, default=1)
    a = parser.parse_args()
    jobs = [
        job
        for job in _jobs(a.suites)
        if (not a.problems or job[1] in a.problems) and (not a.methods or job[2] in a.methods)
    ]
    with Rows(a.out, ("suite", "problem", "method"), len(jobs)) as rows:
        for row in in_parallel(_row, jobs, a.processes):
            rows.add(asdict(row))


if __name__ == "__main__":
    main()
