"""What the noise statistics of `analysis.noise.measure` cost, in gradients of the same batch.

    python -m benchmarks.noise.bench [--out FILE]      rows to results/noise.json

Process CPU time of one thread, the median over rounds of a measurement over the gradient taken just before; beside it
BackPACK's first and second moments of the same batch, which Cockpit computes its noise statistics from. `digits-cnn` is
the bundled network on all its training images, as one batch and as sixteen. Peak memory is of tensors, over and above
what is held before, by torch's profiler.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.suite import Rows, command

__all__ = ["PROBLEMS", "main", "measure"]

ROUNDS = 9

Data = tuple[nn.Module, Tensor, Tensor]


def _mlp() -> Data:
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    return model, torch.randn(1024, 64), torch.randint(10, (1024,))


def _cnn() -> Data:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    return model, torch.randn(256, 1, 8, 8), torch.randint(10, (256,))


def _digits_cnn() -> Data:
    from analysis.tasks import load_task

    task = load_task("digits-cnn")
    return task.model, *task.train_data


PROBLEMS: dict[str, Callable[[], Data]] = {"mlp": _mlp, "cnn": _cnn, "digits-cnn": _digits_cnn}


def measure(name: str) -> list[dict[str, Any]]:
    """Return a row for each method on one problem."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    from analysis.implicit.measure import implicit_regularization
    from analysis.noise.measure import gradient_noise
    from curvature import Objective
    from curvature.per_example import gradient_moments

    torch.manual_seed(0)
    model, x, y = PROBLEMS[name]()
    params = list(model.parameters())
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

    def gradient() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params)

    def with_backpack() -> None:
        with warnings.catch_warnings(), backpack(BatchL2Grad(), SumGradSquared()):
            warnings.simplefilter("ignore")  # its hooks warn where inputs need no gradient
            loss(extended(x), y).backward()

    def noise_and_penalties() -> None:
        moments = gradient_moments(objective, along_mean=True)
        gradient_noise(objective, moments=moments)
        implicit_regularization(objective, lr=0.1, batch_size=32, norms=moments)

    cut = [(x[i::16], y[i::16]) for i in range(16)]
    in_batches = Objective(model, nn.CrossEntropyLoss(), cut)
    nothing_kept = Objective(model, nn.CrossEntropyLoss(), cut, keep_graphs=False)

    def in_sixteen_batches() -> None:
        moments = gradient_moments(in_batches, along_mean=True)
        gradient_noise(in_batches, moments=moments)
        implicit_regularization(in_batches, lr=0.1, batch_size=32, norms=moments)

    def sixteen_gradients() -> None:
        for inputs, targets in cut:
            torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), params)

    methods = {
        "gradient_noise": lambda: gradient_noise(objective),
        "gradient_noise and implicit_regularization, moments shared": noise_and_penalties,
        "gradient, 16 batches": sixteen_gradients,
        "gradient_noise, 16 batches": lambda: gradient_noise(in_batches),
        "gradient_noise and implicit_regularization, moments shared, 16 batches": in_sixteen_batches,
        "gradient_noise, 16 batches, nothing kept": lambda: gradient_noise(nothing_kept),
        "gradient_moments alone": lambda: gradient_moments(objective),
        "BackPACK BatchL2Grad + SumGradSquared": with_backpack,
    }
    rows = []
    for method, call in methods.items():
        if "BackPACK" in method and any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules()):
            continue  # it has no rule for that layer
        call()
        peak = _peak(call)
        ratios, seconds = [], []
        for _ in range(ROUNDS):
            gradient()
            unit = _clocked(gradient)
            seconds.append(_clocked(call))
            ratios.append(seconds[-1] / unit)
        rows.append(
            {
                "problem": name,
                "num_params": sum(p.numel() for p in params),
                "num_examples": len(x),
                "method": method,
                "gradients": statistics.median(ratios),
                "gradients_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "seconds": statistics.median(seconds),
                "peak_mebibytes": peak / 2**20,
                "rounds": ROUNDS,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def _peak(call: Callable[[], Any]) -> int:
    """Return the largest number of bytes in tensors at any one time in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = largest = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest


def _clocked(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Measure all problems and write the rows."""
    parser = command("noise", __doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    a = parser.parse_args()
    with Rows(a.out, ("problem", "method"), len(a.problems)) as rows:
        for name in a.problems:
            rows.begin(name)
            found = measure(name)
            lines = (f"{r['problem']:10} {r['gradients']:7.2f} gradients {r['peak_mebibytes']:7.1f} MiB" for r in found)
            rows.add(*found, said="\n".join(f"{line}  {r['method']}" for line, r in zip(lines, found, strict=True)))


if __name__ == "__main__":
    main()
