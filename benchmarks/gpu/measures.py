"""One row each: eigenpairs, steps of optimizers, heads in blocks, the tests that need a GPU."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.harness import Gauge, math_attention, waits
from benchmarks.common.problems import Problem, make_problem
from benchmarks.common.suite import ROOT, Row
from benchmarks.eigen.methods import EIGEN_METHODS, Meter
from benchmarks.head import bench as head
from benchmarks.optimizers.methods import method_of
from benchmarks.optimizers.peers import take_step
from benchmarks.optimizers.problems import TrainingProblem

__all__ = ["measure_head", "measure_pairs", "measure_step", "prepare", "run_tests", "tidy"]

ROUNDS = 7
NO_STEP = 1e-9
"""A learning rate at which networks stay where they are."""
MIN_SECONDS = 0.5
PERIODS = ("update_every", "update_period", "refresh_every", "precondition_frequency")
"""What optimizers call the number of steps after which all of their work has been done."""


def prepare() -> None:
    """Switch TF32 off for all, which this toolkit's products do without."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.is_available():
        torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")


def tidy() -> None:
    """Free what a row left; fails where a kernel did, after which the device is of no use to this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _facts(problem: Problem, gauge: Gauge, dtype: str = "float32") -> Row:
    facts = {"num_params": problem.num_params, "device": gauge.name, "dtype": dtype, "clock": gauge.clock, "threads": 1}
    return facts | {"examples": len(problem.inputs), "terms": len(problem.targets)}


def measure_pairs(problem_name: str, k: int, method_name: str, options: Row, device: str, limit: float) -> Row:
    """Return the row of the k largest eigenpairs of the Hessian: seconds, products, residual and memory.

    Args:
        problem_name: one of `GPU_PROBLEMS`.
        k: number of pairs.
        method_name: one of `EIGEN_METHODS`.
        options: of `eigsh`.
        device: "cpu" or "cuda".
        limit: seconds after which the solver is stopped at its next product.
    """
    gauge, method = Gauge(device), EIGEN_METHODS[method_name]
    method.load()
    problem = make_problem(problem_name, device=device)
    row = {**_facts(problem, gauge), "options": options}
    meter = Meter(time.process_time() + limit)
    gauge.reset()
    start = gauge.now()
    if method.ours:
        row |= _our_pairs(problem, k, meter, options)
    else:
        with math_attention():  # which other libraries need
            found = method.make(problem, k, meter, torch.empty(0))()
        row |= {"eigenvalues": _listed(found.values), "status": found.said, "converged": found.converged}
    row |= {"seconds": gauge.now() - start, "products": meter.products}
    return row | {"peak_mebibytes": gauge.extra_mebibytes()}


def _our_pairs(problem: Problem, k: int, meter: Meter, options: Row) -> Row:
    from curvature import HessianOperator, Objective
    from curvature.linalg import eigsh

    A = HessianOperator(Objective(problem.model, problem.loss, (problem.inputs, problem.targets)))
    A._matmat = meter.watch(A._matmat)  # type: ignore[method-assign]
    narrow = {"basis_dtype": getattr(torch, options["basis_dtype"])} if "basis_dtype" in options else {}
    pairs = eigsh(A, k, generator=0, **{**options, **narrow})
    residual = float((pairs.residual_norms / pairs.eigenvalues.abs()).max())
    values = {"eigenvalues": _listed(pairs.eigenvalues), "residual": residual}
    return values | {"status": pairs.status.value, "converged": pairs.status.ok}


def _listed(values: Tensor) -> list[float]:
    return sorted(map(float, values.flatten().tolist()), reverse=True)


def measure_step(problem_name: str, method_name: str, device: str) -> Row:
    """Return the row of an optimizer: the cost of a step in steps of SGD taken in turn with it, and its memory.

    A method that measures curvature, or refreshes what it keeps, on every n-th step takes n of them a round.
    """
    gauge, method, problem = Gauge(device), method_of(method_name), make_problem(problem_name, device=device)
    row = _facts(problem, gauge)
    training = TrainingProblem(
        name=problem_name,
        model=problem.model,
        loss=problem.loss,
        inputs=problem.inputs,
        targets=problem.targets,
        batch_size=len(problem.inputs),
        steps=0,
        outputs=_outputs,
        score=lambda _: 0.0,
    )
    batch, sgd = (problem.inputs, problem.targets), method_of("sgd")
    gauge.reset()
    optimizer = method.make(training.params, NO_STEP, problem.loss)
    settings = {**optimizer.defaults, **dict(method.settings)}
    period = max(int(settings.get(name) or 1) for name in PERIODS)
    for _ in range(2):
        take_step(method, optimizer, training, batch)
    row["peak_mebibytes"] = gauge.extra_mebibytes()
    if gauge.on_gpu:
        row["waits"] = waits(lambda: take_step(method, optimizer, training, batch))
    plain = sgd.make(training.params, NO_STEP, problem.loss)
    take_step(sgd, plain, training, batch)
    for _ in range((-3 if gauge.on_gpu else -2) % period):  # the first refresh of a round is its first step
        take_step(method, optimizer, training, batch)
    steps: list[float] = []
    of_sgd: list[float] = []
    end = time.perf_counter() + MIN_SECONDS
    while len(steps) < ROUNDS or time.perf_counter() < end:
        for taken, one, stepper, count in ((of_sgd, sgd, plain, 1), (steps, method, optimizer, period)):
            start = gauge.now()
            for _ in range(count):
                take_step(one, stepper, training, batch)
            taken.append((gauge.now() - start) / count)
    ratios = [own / other for own, other in zip(steps, of_sgd, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    row |= {"sgd_steps": middle, "quartiles": (low, high), "sgd_seconds": statistics.median(of_sgd)}
    return row | {"seconds": statistics.median(steps), "rounds": len(steps)}


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    result: Tensor = model(inputs)
    return result


def measure_head(size: str, operator: str, method: str, device: str) -> Row:
    """Return the row of a product behind N x V logits, `size` being "N,V,d": seconds and memory."""
    gauge = Gauge(device)
    N, V, d = map(int, size.split(","))
    row = head.measure(N, V, d, operator, method, device)
    facts = {"device": gauge.name, "dtype": "float32", "clock": gauge.clock, "threads": 1, "label": method}
    return {**facts, "peak_mebibytes": row.get("extra_mebibytes"), **row}


def run_tests(log: Path, processes: int, limit: float) -> Row:
    """Run the tests that need a GPU; the row has their numbers and names those that fail. Their output is in `log`."""
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_cuda*.py"))]
    report = log.with_suffix(".xml")
    options = ["-q", "-n", str(processes), "--dist", "loadgroup", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", *options, "--tb=short", f"--junitxml={report}", *files]
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        try:
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failure": f"took more than {limit:.0f} s"}
    seconds = time.perf_counter() - start
    if not report.exists():
        return {"failure": "pytest wrote no report", "seconds": seconds}
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    report.unlink()
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors")}
    skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - skipped
    return {"passed": passed, "failed": bad, "skipped": skipped, "seconds": seconds}
