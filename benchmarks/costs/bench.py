"""What the calls of docs/questions.md cost, in gradients of the same loss.

    python -m benchmarks.costs.bench [--nets digits-cnn ...] [--calls "top" ...] [--again] [--out FILE]

Gradient and call take turns, so that what slows the machine down slows both; a row has the median of their ratio. A
gradient is one forward and backward pass of plain autograd over all data (of optimizers: over a mini-batch of
128). Graphs that the objective keeps are released before a call, so that its set-up counts, but for the products of
operators. Rows that are there already stay unless `--again`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from analysis.training.loop import training_loss
from benchmarks.common.harness import Conditions
from benchmarks.common.processes import Worker
from benchmarks.common.suite import Row, Rows, command
from benchmarks.costs.calls import CALLS, NETS, Net

__all__ = ["main", "measure"]

ROUNDS, SECONDS = 9, 0.4
"""At most so many rounds, and none begins after so many seconds; at least one."""
LONG = 2.0
"""Seconds of a first call that counts: set-up is little of it."""
TIMEOUT_SECONDS = 270.0


def measure(net: str, call: str) -> Row:
    """Return the row of a call on a network."""
    found, at = CALLS[call], Net(net)
    objective = at.objective
    params = list(objective.space.tensors.values())
    _ = at.g, at.adam, at.v, at.batch
    batches = [at.batch] if found.batch else list(objective.batches())

    def gradient() -> None:
        for batch in batches:
            torch.autograd.grad(training_loss(objective, batch), params)

    def work() -> Any:
        if not found.kept:
            objective.release()
        return found.work(at)

    gradient()
    repeats = max(1, math.ceil(0.05 / _seconds(gradient)[0]))
    before = _of(gradient, repeats)
    first, result = _seconds(work)
    rounds = [(first, before, _of(gradient, repeats))] if first > LONG else []
    end = time.perf_counter() + SECONDS
    while not rounds or (first <= LONG and len(rounds) < ROUNDS and time.perf_counter() < end):
        before = _of(gradient, repeats)
        seconds, result = _seconds(work)
        rounds.append((seconds, before, _of(gradient, repeats)))
    units = found.per(at, result)
    ratios = [2 * seconds / (low + high) / units for seconds, low, high in rounds]
    products = getattr(result, "num_matvecs", None)
    return {
        "net": net,
        "call": call,
        "gradients": statistics.median(ratios),
        "gradients_range": (min(ratios), max(ratios)),
        "products": int(products) if isinstance(products, (int, float)) else None,
        "seconds": statistics.median(seconds for seconds, _, _ in rounds),
        "gradient_seconds": statistics.median(low for _, low, _ in rounds),
        "rounds": len(rounds),
        "num_params": objective.num_params,
        **vars(Conditions()),
    }


def _of(gradient: Callable[[], None], repeats: int) -> float:
    begun = time.process_time()
    for _ in range(repeats):
        gradient()
    return (time.process_time() - begun) / repeats


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def _prepare() -> None:
    torch.set_num_threads(1)


def _tidy() -> None:
    gc.collect()


def main() -> None:
    """Measure what is asked for."""
    parser = command("costs", __doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=list(CALLS), metavar="CALL")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    a = parser.parse_args()
    wanted = [(net, call) for net in a.nets for call in a.calls if net in CALLS[call].nets]
    order = {(net, call): i for i, (net, call) in enumerate((n, c) for c in CALLS for n in NETS)}

    def finish(rows: list[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: order.get((row["net"], row["call"]), len(order)))

    with Rows(a.out, ("net", "call"), len(wanted), finish) as rows:
        there = set() if a.again else {(row["net"], row["call"]) for row in rows.rows}
        worker = Worker(_prepare, _tidy)
        for net, call in wanted:
            rows.begin(f"{net}, {call}")
            if (net, call) in there:
                rows.add(steps=1)
                continue
            known = {"net": net, "call": call}
            row = worker.row(measure, known, timeout_seconds=TIMEOUT_SECONDS, net=net, call=call)
            said = row.get("failure") or f"{row['gradients']:.3g} gradients"
            rows.add(row, said=f"{net}, {call}: {said}")
        worker.stop()


if __name__ == "__main__":
    main()
