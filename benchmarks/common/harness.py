"""Measure one method on one problem in a process of its own, and print the row as JSON.

Order matters: libraries are imported and a few gradients computed before the peak of the resident set is read, then the
product is made and applied and the peak is read again; only then come the clocks and the reference.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.peers import GPU_METHODS, METHODS, Method, Operator, Product, by_hand, flatten
from benchmarks.common.problems import Problem, make_problem

__all__ = [
    "DOUBLE_PARAMS",
    "Conditions",
    "Gauge",
    "Row",
    "gradient",
    "math_attention",
    "measure",
    "one_line",
    "peak_mebibytes",
    "waits",
]

WARM_UP = 3
LONG = 1.0
"""Seconds of a first product above which one more is warm-up enough."""
MIN_ROUNDS, MAX_ROUNDS = 5, 200
CHECKED_COLUMNS, CHECKED_ENTRIES = 4, 1 << 22
DOUBLE_PARAMS = 200_000_000
"""Up to so many parameters the reference is in float64; further ones would not fit."""


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
    peak_mebibytes: float | None = None
    """On a GPU: the most that was allocated, gradients, set-up and products, beyond model, data and vectors."""
    gradient_mebibytes: float | None = None
    """On a GPU: the same with gradients only."""
    waits: int | None = None
    """On a GPU: how often the host waits for it within a product."""
    error: float | None = None
    """|A X - R| / |R|, Frobenius, over up to `CHECKED_COLUMNS` columns and `CHECKED_ENTRIES` evenly spaced entries of
    each; R by double backward, in float64 up to `DOUBLE_PARAMS` parameters and in float32 beyond."""
    rounds: int = 0
    attention: str = "as in the model"
    failure: str | None = None
    """Why there are no figures."""


def measure(
    problem_name: str,
    operator: Operator,
    method_name: str,
    *,
    seconds: float,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
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
        dtype: of weights and data; the reference has the weights rounded to it.
    """
    torch.set_num_threads(threads)
    gauge = Gauge(device, threads)
    method = {**METHODS, **GPU_METHODS}[method_name]
    row: dict[str, Any] = {"problem": problem_name, "operator": operator, "method": method_name, "label": method.label}
    row |= {"columns": method.columns, "threads": threads, "clock": gauge.clock, "dtype": dtype, "device": gauge.name}
    figures, result = _figures(method, problem_name, operator, gauge, seconds, dtype)
    if result is not None:
        gc.collect()
        if gauge.on_gpu:
            torch.cuda.empty_cache()  # the reference needs the room
        figures["error"] = _error(problem_name, operator, result, device, dtype)
    return Row(**row, **figures)


def _figures(
    method: Method, problem_name: str, operator: Operator, gauge: Gauge, seconds: float, dtype: str
) -> tuple[dict[str, Any], Tensor | None]:
    """Return what is measured, and the entries of a product that are compared; None where there is a failure."""
    problem = make_problem(problem_name, device=gauge.device, dtype=getattr(torch, dtype))
    figures: dict[str, Any] = {"num_params": problem.num_params}
    try:
        method.load()
    except ImportError as error:
        return figures | {"failure": one_line(error)}, None
    X = _vectors(problem, method.columns)

    gauge.reset()
    for _ in range(WARM_UP):
        gradient(problem)
    peak = peak_mebibytes(gauge.device)
    if gauge.on_gpu:
        figures["gradient_mebibytes"] = gauge.extra_mebibytes()
    start = gauge.now()
    made = _make(method, problem, operator, X)
    first = gauge.now() - start
    if isinstance(made, str):
        return figures | {"failure": made}, None
    product, result, attention = made
    for _ in range(1 if method.columns > 1 or first > LONG else WARM_UP):
        result = product(X)
    figures["extra_mebibytes"] = peak_mebibytes(gauge.device) - peak
    if gauge.on_gpu:
        figures |= {"peak_mebibytes": gauge.extra_mebibytes(), "waits": waits(lambda: product(X))}
    gradients, products = _time(lambda: gradient(problem), lambda: product(X), gauge.now, seconds)
    look = getattr(product, "look", None)
    looks = None if look is None else _time(lambda: product(X), look, gauge.now, min(seconds, 1.0))
    per_column = products / method.columns
    ratios = per_column / gradients
    figures |= {
        "seconds": float(per_column.median()),
        "seconds_quartiles": _quartiles(per_column),
        "gradients": float(ratios.median()),
        "gradients_quartiles": _quartiles(ratios),
        "gradient_seconds": float(gradients.median()),
        "look_share": None if looks is None else float((looks[1] / looks[0]).median()),
        "first_seconds": first,
        "rounds": len(gradients),
        "attention": attention,
    }
    return figures, _checked(result)


class Gauge:
    """Clock and peak memory of a device.

    On a GPU the clock is the wall clock once its queue is empty and memory is what torch has allocated; elsewhere, the
    CPU time of the process, with several threads the wall clock, and its resident set (Linux).
    """

    def __init__(self, device: str, threads: int = 1) -> None:
        self.device, self.on_gpu = device, device == "cuda"
        self.name = torch.cuda.get_device_name() if self.on_gpu else device
        self.clock = "process CPU time" if threads == 1 and not self.on_gpu else "wall clock"
        self._before = 0.0

    def now(self) -> float:
        """Return the seconds of the clock."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.process_time() if self.clock == "process CPU time" else time.perf_counter()

    def reset(self) -> None:
        """Measure memory from what is in use now."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        elif sys.platform == "linux":
            self._before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def extra_mebibytes(self) -> float:
        """Return the most that was in use since the reset, above what was in use then."""
        return (torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else _resident("VmHWM")) - self._before


def waits(work: Callable[[], object]) -> int:
    """Return how often the host waits for the GPU within some work."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _resident(kind: str) -> float:
    """Return the resident set (VmRSS) or its peak since it was last reset (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 2**10


def _vectors(problem: Problem, columns: int) -> Tensor:
    """Return normal vectors; the first are the same for any number of columns."""
    device = problem.inputs.device
    generator = torch.Generator(device).manual_seed(1)
    X = [torch.randn(problem.num_params, generator=generator, device=device) for _ in range(columns)]
    return X[0] if columns == 1 else torch.stack(X, dim=1)


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
                product, result = _first(method, problem, operator, X)
        except Exception as error:
            failures.append(one_line(error))
            problem.model.zero_grad()
            continue
        if failures:
            product, attention = _under_math(product), f"{attention}, set by the benchmark; without it: {failures[0]}"
        return product, result, attention
    return failures[-1]


def _first(method: Method, problem: Problem, operator: Operator, X: Tensor) -> tuple[Product, Tensor]:
    product = method.make(problem, operator)
    return product, product(X)


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


def _checked(X: Tensor) -> Tensor:
    """Return (entries, columns) in float64: what of a block of vectors is compared with the reference."""
    X = X.detach().reshape(len(X), -1)
    return X[:: -(-len(X) // CHECKED_ENTRIES), :CHECKED_COLUMNS].double().cpu()


def _error(problem_name: str, operator: Operator, found: Tensor, device: str, dtype: str) -> float | None:
    try:
        expected = _expected(problem_name, operator, found.shape[1], device, dtype)
    except torch.OutOfMemoryError:
        return None
    return float((found - expected).norm() / expected.norm())


@functools.cache
def _expected(problem_name: str, operator: Operator, columns: int, device: str, dtype: str) -> Tensor:
    problem = make_problem(problem_name, dtype=getattr(torch, dtype), device=device)
    exact = torch.float64 if problem.num_params <= DOUBLE_PARAMS else torch.float32
    X = _vectors(problem, columns).reshape(-1, columns)
    product = _reference(problem.to(exact), operator)
    return torch.cat([_checked(product(x.to(exact))) for x in X.T], dim=1)


def _reference(problem: Problem, operator: Operator) -> Product:
    with math_attention():
        return by_hand(problem, operator)


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
