"""Products, eigenpairs, optimizer steps and memory on a GPU: `python -m benchmarks.gpu.bench [--tests]`.

One process measures row after row; it is replaced where a row takes it down or takes too long. Rows are written one by
one, this toolkit's first. When the time is up, those that are left are written as not run. `--small --device cpu` goes
through one row of every kind with tiny networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common.harness import measure
from benchmarks.common.peers import GPU_METHODS, METHODS, Operator
from benchmarks.common.processes import Worker
from benchmarks.common.suite import Row, Rows, command, stored
from benchmarks.eigen.methods import EIGEN_METHODS
from benchmarks.gpu.measures import measure_head, measure_pairs, measure_step, prepare, run_tests, tidy
from benchmarks.optimizers.methods import method_of
from benchmarks.products.bench import said as product_said

__all__ = ["KEY", "cases", "main"]

KEY = ("kind", "problem", "operator", "method", "k", "dtype")
TEST_SECONDS, TEST_PROCESSES = 180.0, 12
TIMING_SECONDS = 0.6
OURS, PLAIN = ("kept",), ("by-hand",)
SMALL_NETWORKS = ("cnn-1m", "mlp-20m")
LARGE = ("gpt2-124m", "gpt2-124m-long", "llama-0.5b", "llama-1.5b")
PAIRS: dict[str, tuple[int, Row]] = {
    "cnn-1m": (10, {}),
    "mlp-20m": (10, {}),
    "gpt2-124m": (3, {}),
    "llama-0.5b": (3, {"num_basis": 8, "rtol": 1e-2}),
    "llama-1.5b": (1, {"num_basis": 5, "rtol": 1e-2, "basis_dtype": "bfloat16"}),
}
MATRIX_STEPS = ("adamw", "muon", "soap-steady", "shampoo-steady", "KFAC", "EKFAC", "GaussNewton")
HEADS = ("16384,50304,768", "16384,131072,768")


@dataclass(frozen=True)
class Case:
    """One row: what tells it from others, and the call that measures it."""

    known: Row
    work: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def _product(problem: str, operator: Operator, method: str, device: str, dtype: str = "float32") -> Case:
    label = {**METHODS, **GPU_METHODS}[method].label
    known = {"kind": "product", "problem": problem, "operator": operator, "method": method, "label": label}
    settings = {"problem_name": problem, "operator": operator, "method_name": method, "dtype": dtype}
    return Case({**known, "dtype": dtype}, measure, {**settings, "seconds": TIMING_SECONDS, "device": device})


def _products(problem: str, methods: tuple[str, ...], device: str) -> Iterator[Case]:
    for method in methods:
        for operator in {**METHODS, **GPU_METHODS}[method].operators:
            yield _product(problem, operator, method, device)


def _pairs(problem: str, method: str, device: str, row_limit: float, k: int, options: Row) -> Case:
    known = {"kind": "pairs", "problem": problem, "operator": "hessian", "method": method, "k": k, "dtype": "float32"}
    known |= {"label": EIGEN_METHODS[method].label}
    settings = {"problem_name": problem, "k": k, "method_name": method, "options": options}
    return Case(known, measure_pairs, {**settings, "device": device, "limit": 0.8 * row_limit})


def _step(problem: str, method: str, device: str) -> Case:
    known = {"kind": "step", "problem": problem, "method": method, "label": method_of(method).label, "dtype": "float32"}
    return Case(known, measure_step, {"problem_name": problem, "method_name": method, "device": device})


def _head(size: str, operator: str, method: str, device: str) -> Case:
    known = {"kind": "head", "problem": size, "operator": operator, "method": method, "dtype": "float32"}
    return Case(known, measure_head, {"size": size, "operator": operator, "method": method, "device": device})


def cases(device: str, row_limit: float) -> list[Case]:
    """Return what is measured, what matters most first: this toolkit and plain torch, then other libraries."""
    peers = ("curvlinops", "hessian-eigenthings")
    found: list[Case] = []
    for problem in (*LARGE, *SMALL_NETWORKS):
        found += _products(problem, OURS + PLAIN, device)
    found += [_pairs(name, "eigsh", device, row_limit, k, options) for name, (k, options) in PAIRS.items()]
    found += [_step(name, method, device) for name in PAIRS for method in ("adahessian", "adahessian-10")]
    found += [_step(name, method, device) for name in ("mlp-20m", "gpt2-124m-long") for method in MATRIX_STEPS]
    found += [_head(size, matrix, "blocks", device) for size in HEADS for matrix in ("ggn", "hessian")]
    found += [_product("llama-1.5b", operator, "kept", device, "bfloat16") for operator in METHODS["kept"].operators]
    for problem in (*LARGE[:3], *SMALL_NETWORKS):
        found += _products(problem, peers, device)
    found += [_head(size, matrix, "whole", device) for size in HEADS for matrix in ("ggn", "hessian")]
    found += _products("gpt2-124m", ("rebuilt", "by-hand-replayed"), device)
    for problem in SMALL_NETWORKS:
        found += _products(problem, ("rebuilt", "kept-16", "by-hand-replayed"), device)
    found += [_step(name, "calls", device) for name in ("cnn-1m", "gpt2-124m")]
    found += [_step(name, peer, device) for name in PAIRS for peer in ("torch-optimizer", "kozistr")]
    found += _products("cnn-1m", ("compiled",), device)
    found += _products("llama-1.5b", peers, device)
    found += [_head(HEADS[0], matrix, "curvlinops", device) for matrix in ("ggn", "hessian")]
    for problem in ("gpt2-124m", "cnn-1m"):
        k, _ = PAIRS[problem]
        found += [_pairs(problem, peer, device, row_limit, k, {}) for peer in ("het-lanczos-doubled", "curvlinops")]
    return [*found, *_products("gpt2-124m", ("compiled",), device)]


def _small_cases(device: str, row_limit: float) -> list[Case]:
    """Return a row or two of each kind, with tiny networks."""
    options = {"num_basis": 5, "rtol": 1e-2, "basis_dtype": "bfloat16"}
    return [
        *_products("mlp-tiny", ("kept", "by-hand-replayed"), device),
        _product("cnn-tiny", "hessian", "by-hand", device),
        _product("cnn-tiny", "ggn", "kept", device, "bfloat16"),
        _pairs("mlp-tiny", "eigsh", device, row_limit, 1, options),
        *(_step("mlp-tiny", method, device) for method in ("adahessian-10", "soap-steady", "KFAC")),
        _head("64,50,4", "ggn", "blocks", device),
        *_products("gpt2-tiny", ("kept",), device),
        *_products("llama-tiny", ("kept",), device),
    ]


def _said(row: Row) -> str:
    if row["kind"] == "product":
        return product_said(row)
    what = " ".join(str(row[name]) for name in KEY if row.get(name) is not None)
    if row.get("failure"):
        return f"{what}: {row['failure']}"
    shown = ("seconds", "products", "sgd_steps", "peak_mebibytes", "passed", "failed", "status")
    return f"{what}: " + ", ".join(f"{key} {row[key]}" for key in shown if row.get(key) is not None)


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("gpu", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks, a row or two of each kind")
    parser.add_argument("--tests", action="store_true", help="first the tests that need a GPU")
    parser.add_argument("--kinds", nargs="+", choices=("product", "pairs", "step", "head"))
    parser.add_argument("--problems", nargs="+", help="only rows of these")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds in all")
    parser.add_argument("--row-limit", type=float, default=60.0, help="seconds a row")
    a = parser.parse_args()
    end = time.monotonic() + a.limit
    chosen = [
        case
        for case in (_small_cases if a.small else cases)(a.device, a.row_limit)
        if (a.kinds is None or case.known["kind"] in a.kinds)
        and (a.problems is None or case.known["problem"] in a.problems)
    ]
    before = {tuple(row.get(name) for name in KEY) for row in stored(a.out)}
    with Rows(a.out, KEY, len(chosen) + a.tests) as rows:
        if a.tests:
            rows.begin("tests")
            row = run_tests(a.out.with_suffix(".tests.txt"), TEST_PROCESSES, min(TEST_SECONDS, a.limit / 2))
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
            rows.add({"kind": "tests", "problem": "tests", "device": gpu, **row}, said=str(row))
        worker = Worker(prepare, tidy)
        for case in chosen:
            left = end - time.monotonic()
            rows.begin(" ".join(str(value) for key, value in case.known.items() if key != "label"))
            if left > 5:
                row = worker.row(case.work, case.known, timeout_seconds=min(a.row_limit, left), **case.arguments)
                rows.add(row, said=_said(row))
            elif tuple(case.known.get(name) for name in KEY) not in before:
                rows.add({**case.known, "failure": f"not run: the {a.limit:.0f} s for all rows were over"})
        worker.stop()


if __name__ == "__main__":
    main()
