"""What products cost where the vocabulary is large: the head in blocks beside logits that are whole.

    python -m benchmarks.head.bench [--sizes N,V,d ...] [--methods ...] [--out FILE]      rows to results/head.json

Rows of features go through a hidden layer of tanh units and a linear head of V classes into the cross-entropy, float32,
one thread. Each row of the results comes from a process of its own (Linux): the peak of the resident set above what
the process held before its first product, the CPU seconds of the first product, and the median of later ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.harness import git, one_line
from benchmarks.common.processes import row_of, write_rows

__all__ = ["METHODS", "SIZES", "main", "measure"]

RESULTS = Path(__file__).parents[1] / "results" / "head.json"
SIZES = ["2048,50304,64", "8192,10000,64", "512,50304,768", "16384,50304,64", "16384,131072,64"]
TIMEOUT_SECONDS, ROUNDS = 900, 3
LIMIT_GIBIBYTES = 12  # of logits and what has their size, five times over: larger ones do not fit here
Product = Callable[[Tensor], Tensor]


def _toolkit(head: str | None) -> Callable[[nn.Module, Tensor, Tensor, str], Product]:
    def make(model: nn.Module, x: Tensor, y: Tensor, matrix: str) -> Product:
        from curvature import GGNOperator, HessianOperator, Objective

        objective = Objective(model, nn.CrossEntropyLoss(), (x, y), head=head, keep_graphs=True)
        operator = HessianOperator(objective) if matrix == "hessian" else GGNOperator(objective)
        return lambda v: operator @ v

    return make


def _by_hand(model: nn.Module, x: Tensor, y: Tensor, matrix: str) -> Product:
    params = list(model.parameters())
    if matrix != "hessian":
        raise NotImplementedError("written by hand for the Hessian only")

    def product(v: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        parts = [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradient, params, parts)])

    return product


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, matrix: str) -> Product:
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    kind = HessianLinearOperator if matrix == "hessian" else GGNLinearOperator
    operator = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False)
    return lambda v: operator @ v


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, str], Product]] = {
    "blocks": _toolkit("2"),
    "whole": _toolkit(None),
    "by hand": _by_hand,
    "curvlinops": _curvlinops,
}


def _resident(kind: str) -> float:
    """Return the resident set (VmRSS) or its peak since it was last reset (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 2**10


def measure(size: str, matrix: str, method: str) -> dict[str, Any]:
    """Return the row of a method."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    N, V, d = map(int, size.split(","))
    row: dict[str, Any] = {"N": N, "V": V, "d": d, "matrix": matrix, "method": method}
    row |= {"torch": str(torch.__version__), "python": platform.python_version(), "git": git()}
    if method != "blocks" and 5 * 4 * N * V > LIMIT_GIBIBYTES * 2**30:
        return row | {"failure": "does not fit"}
    model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, V, bias=False))
    x, y = torch.randn(N, d), torch.randint(V, (N,))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    try:
        product = METHODS[method](model, x[:64], y[:64], matrix)  # code is loaded before the first reading
        product(v)
        del product
        gc.collect()
        product = METHODS[method](model, x, y, matrix)
        before, start = _resident("VmRSS"), time.process_time()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is reset
        product(v)
        first, seconds = time.process_time() - start, []
        for _ in range(ROUNDS):
            start = time.process_time()
            product(v)
            seconds.append(time.process_time() - start)
    except Exception as error:
        return row | {"failure": one_line(error)}
    of_vector = 4 * len(v) / 2**20
    row |= {
        "extra_mebibytes": _resident("VmHWM") - before,
        "vector_mebibytes": of_vector,
        "logits_mebibytes": 4 * N * V / 2**20,
    }
    return row | {"first_seconds": first, "seconds": statistics.median(seconds)}


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head.bench", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="N,V,d: rows, classes, width")
    parser.add_argument("--matrices", nargs="+", choices=("ggn", "hessian"), default=["ggn", "hessian"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--row", nargs=3, help="one size, matrix and method, in this process")
    a = parser.parse_args()
    if a.row:
        print(json.dumps(measure(*a.row)))
        return
    rows = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else []
    for size in a.sizes:
        for matrix in a.matrices:
            for method in a.methods:
                N, V, d = map(int, size.split(","))
                known = {"N": N, "V": V, "d": d, "matrix": matrix, "method": method}
                arguments = ["--row", size, matrix, method]
                row = row_of("benchmarks.head.bench", arguments, known, timeout_seconds=TIMEOUT_SECONDS)
                print(row, flush=True)
                rows = [r for r in rows if {k: r[k] for k in known} != known] + [row]
                write_rows(a.out, rows)


if __name__ == "__main__":
    main()
