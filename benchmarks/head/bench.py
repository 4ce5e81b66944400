"""What products cost where the vocabulary is large: the head in blocks beside logits that are whole.

    python -m benchmarks.head.bench [--sizes N,V,d ...] [--methods ...] [--out FILE]      rows to results/head.json

Products with two matrices, and norms and variance of the gradients of single texts of 128 rows.

Rows of features go through a hidden layer of tanh units and a linear head of V classes into the cross-entropy, float32,
one thread. Each row of the results comes from a process of its own (Linux): the peak of the resident set above what
the process held before its first product, the CPU seconds of the first product, and the median of later ones. What
blocks take in times of the whole form comes from a process that multiplies with both in turn.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.harness import Gauge, one_line
from benchmarks.common.processes import alone
from benchmarks.common.suite import Rows, command

__all__ = ["METHODS", "SIZES", "in_turn", "main", "measure"]

SIZES = ["2048,50304,64", "8192,10000,64", "512,50304,768", "16384,50304,64", "16384,131072,64"]
TIMEOUT_SECONDS, ROUNDS, TURNS = 900, 3, 9
MATRICES, PER_EXAMPLE, TEXT = ("ggn", "hessian"), ("norms", "variance"), 128
LIMIT_GIBIBYTES = 12  # of logits and what has their size, five times over: larger ones do not fit here
IN_TURN = "blocks and whole in turn"
Product = Callable[[Tensor], Tensor]


def _toolkit(head: str | None) -> Callable[[nn.Module, Tensor, Tensor, str], Product]:
    def make(model: nn.Module, x: Tensor, y: Tensor, matrix: str) -> Product:
        from curvature import GGNOperator, HessianOperator, Objective
        from curvature.per_example import gradient_moments, gradient_norms

        if matrix in PER_EXAMPLE:
            texts = x.unflatten(0, (-1, min(TEXT, len(x)))), y.unflatten(0, (-1, min(TEXT, len(y))))
            of = Objective(model, nn.CrossEntropyLoss(), texts, forward=_flattened, head=head)
            if matrix == "norms":
                return lambda _: gradient_norms(of).squared_norms  # type: ignore[return-value]
            return lambda _: gradient_moments(of, norms=False).variance
        objective = Objective(model, nn.CrossEntropyLoss(), (x, y), head=head, keep_graphs=True)
        operator = HessianOperator(objective) if matrix == "hessian" else GGNOperator(objective)
        return lambda v: operator @ v

    return make


def _flattened(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]).flatten(0, 1), batch[1].flatten()


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

    if matrix in PER_EXAMPLE:
        raise NotImplementedError("matrices only")
    kind = HessianLinearOperator if matrix == "hessian" else GGNLinearOperator
    operator = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False)
    return lambda v: operator @ v


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, str], Product]] = {
    "blocks": _toolkit("2"),
    "whole": _toolkit(None),
    "by hand": _by_hand,
    "curvlinops": _curvlinops,
}


def measure(N: int, V: int, d: int, matrix: str, method: str, device: str = "cpu") -> dict[str, Any]:
    """Return the row of a method."""
    torch.manual_seed(0)
    gauge = Gauge(device)
    row: dict[str, Any] = {"N": N, "V": V, "d": d, "matrix": matrix, "method": method}
    if not gauge.on_gpu and method != "blocks" and not _fits(N, V):
        return row | {"failure": "does not fit"}
    model, x, y, v = _problem(N, V, d, device)
    try:
        product = METHODS[method](model, x[:64], y[:64], matrix)  # code is loaded before the first reading
        product(v)
        del product
        gc.collect()
        product = METHODS[method](model, x, y, matrix)
        gauge.reset()
        start = gauge.now()
        product(v)
        first, seconds = gauge.now() - start, []
        for _ in range(ROUNDS):
            start = gauge.now()
            product(v)
            seconds.append(gauge.now() - start)
    except Exception as error:
        return row | {"failure": one_line(error)}
    row |= {
        "extra_mebibytes": gauge.extra_mebibytes(),
        "vector_mebibytes": 4 * len(v) / 2**20,
        "logits_mebibytes": 4 * N * V / 2**20,
    }
    return row | {"first_seconds": first, "seconds": statistics.median(seconds)}


def _fits(N: int, V: int) -> bool:
    return 5 * 4 * N * V <= LIMIT_GIBIBYTES * 2**30


def _problem(N: int, V: int, d: int, device: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, V, bias=False))
        x, y = torch.randn(N, d), torch.randint(V, (N,))
        return model, x, y, torch.randn(sum(p.numel() for p in model.parameters()))


def in_turn(N: int, V: int, d: int, matrix: str, device: str = "cpu") -> dict[str, Any]:
    """Return the median of the ratios of the times of later products in blocks and with whole logits, made in turn."""
    row: dict[str, Any] = {"N": N, "V": V, "d": d, "matrix": matrix, "method": IN_TURN}
    torch.manual_seed(0)
    gauge = Gauge(device)
    model, x, y, v = _problem(N, V, d, device)
    products = [METHODS[method](model, x, y, matrix) for method in ("blocks", "whole")]
    first, second = (product(v) for product in products)
    error = float((first - second).norm() / second.norm())
    taken: list[list[float]] = []
    for _ in range(TURNS):
        taken.append([])
        for product in products:
            start = gauge.now()
            product(v)
            taken[-1].append(gauge.now() - start)
    blocks, whole = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    ratio = statistics.median(of_blocks / of_whole for of_blocks, of_whole in taken)
    return row | {"seconds": blocks, "whole_seconds": whole, "ratio": ratio, "error": error}


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("head", __doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="N,V,d: rows, classes, width")
    parser.add_argument("--matrices", nargs="+", choices=(*MATRICES, *PER_EXAMPLE), default=list(MATRICES))
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, IN_TURN), default=[*METHODS, IN_TURN])
    a = parser.parse_args()
    cases = list(itertools.product(a.sizes, a.matrices, a.methods))
    with Rows(a.out, ("N", "V", "d", "matrix", "method"), len(cases)) as rows:
        for size, matrix, method in cases:
            N, V, d = map(int, size.split(","))
            known = {"N": N, "V": V, "d": d, "matrix": matrix, "method": method}
            if method != IN_TURN:
                row = alone(measure, known, timeout_seconds=TIMEOUT_SECONDS, **known)
            elif _fits(N, V):
                row = alone(in_turn, known, timeout_seconds=TIMEOUT_SECONDS, N=N, V=V, d=d, matrix=matrix)
            else:
                row = known | {"failure": "does not fit"}
            rows.add(row, said=str(row))


if __name__ == "__main__":
    main()
