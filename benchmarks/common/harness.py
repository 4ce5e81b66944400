"""Measure one method on one problem in a process of its own, and print the row as JSON.

Order matters: libraries are imported and a few gradients computed before the peak of the resident set is read, then the
product is made and applied and the peak is read again; only then come the clocks and the reference.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.peers import METHODS, Method, Operator, Product, by_hand, flatten
from benchmarks.common.problems import Problem, make_problem

__all__ = ["Conditions", "Row", "gradient", "math_attention", "measure", "one_line", "peak_mebibytes"]

WARM_UP = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 200
CHECKED_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a row was measured with."""

    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    clock: str = "process CPU time"
    torch: str = str(torch.__version__)


@dataclass(frozen=True, kw_only=True)
class Row(Conditions):
    """One measurement. All times are of one product with one column."""

    problem: str
    num_params: int
    operator: str
    method: str
    label: str
    columns: int
    """How many columns were multiplied at once; times are divided by it."""
    seconds: float | None = None
    """Median over rounds of the clock named in `clock`."""
    seconds_quartiles: tuple[float, float] | None = None
    gradients: float | None = None
    """Median over rounds of seconds / seconds of the gradient taken just before."""
    gradients_quartiles: tuple[float, float] | None = None
    gradient_seconds: float | None = None
    """Median of the gradient of the same batch."""
    look_share: float | None = None
    """Of this toolkit's products: the part that the look at the present point takes."""
    first_seconds: float | None = None
    """Making the operator and its first product with all columns."""
    extra_mebibytes: float | None = None
    """Peak resident set with products, above that with gradients only."""
    error: float | None = None
    """|A X - R| / |R|, Frobenius, over up to `CHECKED_COLUMNS` columns; R by double backward in float64."""
    rounds: int = 0
    attention: str = "as in the model"
    failure: str | None = None
    """Why there are no figures."""


def measure(
    problem_name: str, operator: Operator, method_name: str, *, seconds: float, threads: int = 1, device: str = "cpu"
) -> Row:
    """Return the row of one method on one problem, with `failure` set if it cannot be had.

    Args:
        problem_name: one of `PROBLEMS`.
        operator: which matrix.
        method_name: one of `METHODS`.
        seconds: how long to repeat, at most `MAX_ROUNDS` and at least `MIN_ROUNDS` times.
        threads: of torch. With one, the clock is the CPU time of the process, which other work on the machine does not
            reach; with more, it is the wall clock.
        device: where to compute. On a GPU the clock is the wall clock once its queue is empty, and the peak is that of
            torch's allocator.
    """
    torch.set_num_threads(threads)
    clock, clock_name = _clock(device, threads)
    method, problem = METHODS[method_name], make_problem(problem_name, device=device)
    row = {"problem": problem_name, "num_params": problem.num_params, "operator": operator, "method": method_name}
    row |= {"label": method.label, "columns": method.columns, "threads": threads, "clock": clock_name}
    row |= {"device": torch.cuda.get_device_name() if device == "cuda" else device}
    try:
        method.load()
    except ImportError as error:
        return Row(**row, failure=one_line(error))  # type: ignore[arg-type]
    X = _vectors(problem, method.columns)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        gradient(problem)
    peak = peak_mebibytes(device)
    start = clock()
    made = _make(method, problem, operator, X)
    first = clock() - start
    if isinstance(made, str):
        return Row(**row, failure=made)  # type: ignore[arg-type]
    product, result, attention = made
    for _ in range(WARM_UP if method.columns == 1 else 1):
        result = product(X)
    extra = peak_mebibytes(device) - peak
    gradients, products = _time(lambda: gradient(problem), lambda: product(X), clock, seconds)
    look = getattr(product, "look", None)
    looks = None if look is None else _time(lambda: product(X), look, clock, min(seconds, 1.0))
    per_column = products / method.columns
    ratios = per_column / gradients
    return Row(
        **row,  # type: ignore[arg-type]
        seconds=float(per_column.median()),
        seconds_quartiles=_quartiles(per_column),
        gradients=float(ratios.median()),
        gradients_quartiles=_quartiles(ratios),
        gradient_seconds=float(gradients.median()),
        look_share=None if looks is None else float((looks[1] / looks[0]).median()),
        first_seconds=first,
        extra_mebibytes=extra,
        error=_error(problem_name, operator, X, result, device),
        rounds=len(gradients),
        attention=attention,
    )


def _clock(device: str, threads: int) -> tuple[Callable[[], float], str]:
    def when_done() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if device == "cuda":
        return when_done, "wall clock"
    return (time.process_time, "process CPU time") if threads == 1 else (time.perf_counter, "wall clock")


def _vectors(problem: Problem, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(problem.num_params, columns, generator=generator).to(problem.inputs.device)
    return X[:, 0].contiguous() if columns == 1 else X


def gradient(problem: Problem) -> Tensor:
    """Return the gradient of the batch, as plain autograd has it."""
    return flatten(torch.autograd.grad(problem.evaluate(), problem.params))


def _make(method: Method, problem: Problem, operator: Operator, X: Tensor) -> tuple[Product, Tensor, str] | str:
    """Return (product, its first result, which attention), or why there is none.

    A method that cannot differentiate the model's fused attention is given a second chance under the math kernel.
    """
    failures = []
    for context, attention in ((contextlib.nullcontext, "as in the model"), (math_attention, "math kernel")):
        try:
            with context():
                product = method.make(problem, operator)
                result = product(X)
        except Exception as error:
            failures.append(one_line(error))
            problem.model.zero_grad()
            continue
        if failures:
            product, attention = _under_math(product), f"{attention}, set by the benchmark; without it: {failures[0]}"
        return product, result, attention
    return failures[-1]


def _under_math(product: Product) -> Product:
    def wrapped(X: Tensor) -> Tensor:
        with math_attention():
            return product(X)

    return wrapped


def math_attention() -> contextlib.AbstractContextManager[None]:
    """Put attention under the kernel that every kind of derivative exists for."""
    return sdpa_kernel(SDPBackend.MATH)


def _time(
    gradient: Callable[[], object], product: Callable[[], object], clock: Callable[[], float], seconds: float
) -> tuple[Tensor, Tensor]:
    """Alternate gradient and product, so that whatever slows the machine down slows both."""
    gradients: list[float] = []
    products: list[float] = []
    end = time.perf_counter() + seconds
    while len(gradients) < MIN_ROUNDS or (time.perf_counter() < end and len(gradients) < MAX_ROUNDS):
        times = [clock()]
        for step in (gradient, product):
            step()
            times.append(clock())
        gradients.append(times[1] - times[0])
        products.append(times[2] - times[1])
    return torch.tensor(gradients, dtype=torch.float64), torch.tensor(products, dtype=torch.float64)


def _error(problem_name: str, operator: Operator, X: Tensor, result: Tensor, device: str) -> float:
    product = _reference(problem_name, operator, device)
    columns, found = (t.detach().double().reshape(len(X), -1)[:, :CHECKED_COLUMNS] for t in (X, result))
    expected = torch.stack([product(x) for x in columns.T], dim=1)
    return float((found - expected).norm() / expected.norm())


def _reference(problem_name: str, operator: Operator, device: str = "cpu") -> Product:
    with math_attention():
        return by_hand(make_problem(problem_name, dtype=torch.float64, device=device), operator)


def _quartiles(x: Tensor) -> tuple[float, float]:
    low, high = x.quantile(torch.tensor([0.25, 0.75], dtype=x.dtype)).tolist()
    return low, high


def peak_mebibytes(device: str = "cpu") -> float:
    """Return the largest resident set of this process so far; on a GPU, the most that torch has had allocated."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def one_line(error: BaseException) -> str:
    """Return the kind and the message of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
