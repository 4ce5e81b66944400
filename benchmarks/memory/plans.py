"""Peaks and times that `plan` predicts, beside those measured, on six networks of 11 thousand to 124 million weights.

The peak is that of the resident set above what the process held after a small call of the same kind.
"""

from __future__ import annotations

import re
import sys
import time
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.common.problems import PROBLEMS, Made, _cnn, _gpt, _gpt2

__all__ = ["CALLS", "PLAN_MODELS", "layers_row", "limit_row", "plan_row"]

MEBI = 2**20
PLAN_MODELS = {
    "mlp-11k": lambda: _mlp_of(32, 64, 64, 64, 10, batch=16_384),
    "cnn-70k": lambda: _cnn(width=32, batch=256),
    "gpt-0.5m": PROBLEMS["gpt"],
    "gpt-6m": lambda: _gpt(vocabulary=512, context=128, width=320, num_heads=5, num_layers=5, batch=16),
    "gpt2-37m": lambda: _gpt2(1, 32, n_layer=4, vocab_size=10_000),
    "gpt2-124m": lambda: _gpt2(4, 128),
}
CALLS = ("product", "ggn product", "eigenpairs", "spectrum")


def _mlp_of(*widths: int, batch: int) -> Made:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))


@patch.object(time, "perf_counter", time.process_time)
def plan_row(model: str, call: str) -> dict[str, Any]:
    """Return predicted and measured peak above the start, in MiB, and seconds.

    Both clocks, that of `plan` too, count the CPU time of the one thread: other work on the machine reaches neither.
    """
    from curvature import Objective, SpectrumPlan, eigsh, plan, spectrum
    from curvature.environment.cost import current_memory, peak_memory
    from curvature.linop import as_matrix

    torch.set_num_threads(1)
    taken: list[float] = []
    cpu = torch.device("cpu")
    matrix: Any = "ggn" if call.startswith("ggn") else "hessian"
    quantities: Any = {"eigenpairs": "eigenpairs", "spectrum": ["top", "trace"]}.get(call, "product")

    def run(made: Any, settings: SpectrumPlan | None) -> int:
        of = Objective(made[0], nn.CrossEntropyLoss(), (made[1], made[2]))
        if call == "eigenpairs":
            return eigsh(of, 3, generator=0).num_matvecs
        if settings is not None:
            return spectrum(of, settings, generator=0).num_matvecs
        A, v = as_matrix(of, matrix), torch.ones(of.num_params)
        _ = A @ v
        for _ in range(3):
            begun = time.perf_counter()
            _ = A @ v
            taken.append(time.perf_counter() - begun)
        return 1

    torch.manual_seed(0)
    small = _gpt2(1, 16, n_layer=1, n_embd=12, n_head=2, vocab_size=300)
    run(small, SpectrumPlan(k=3, num_bottom=0, num_steps=4) if call == "spectrum" else None)
    plan(Objective(small[0], nn.CrossEntropyLoss(), (small[1], small[2])), quantities, matrix=matrix, k=3)
    before = current_memory(cpu)
    made = PLAN_MODELS[model]()
    of = Objective(made[0], nn.CrossEntropyLoss(), (made[1], made[2]))
    planned = plan(of, quantities, matrix=matrix, k=3)
    of_plan = peak_memory(cpu)
    del of
    taken.clear()
    start = time.perf_counter()
    spent = run(made, planned.plan)
    seconds = min(taken) if taken else time.perf_counter() - start
    num_params = sum(p.numel() for p in made[0].parameters())
    return {
        "part": "plan",
        "model": model,
        "num_params": num_params,
        "call": call,
        "start_mebibytes": before / MEBI,
        "planned_mebibytes": (planned.peak_bytes - before) / MEBI,
        "mebibytes": (peak_memory(cpu) - before) / MEBI,
        "of_plan_mebibytes": (of_plan - before) / MEBI,
        "planned_matvecs": planned.num_matvecs,
        "matvecs": spent,
        "planned_seconds": planned.seconds,
        "seconds": seconds,
    }


def limit_row(model: str, limit_bytes: int) -> dict[str, Any]:
    """Return the 3 largest eigenpairs to 1 %, computed as `plan` says within a limit, and the peak of the process."""
    from curvature import Objective, eigsh, plan
    from curvature.environment.cost import peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = PLAN_MODELS[model]()
    of = Objective(made[0], nn.CrossEntropyLoss(), (made[1], made[2]))
    planned = plan(of, "eigenpairs", k=3, memory_limit=limit_bytes)
    start = time.perf_counter()
    own: dict[str, Any] = {"rtol": 0.01, "confidence": None, "generator": 0}
    pairs = eigsh(
        of.replace(**planned.changes), 3, **own, **planned.settings, callback=lambda n, s: print(n, s, file=sys.stderr)
    )
    return {
        "part": "limit",
        "model": model,
        "limit_mebibytes": limit_bytes / MEBI,
        "settings": str(planned.changes | planned.settings),
        "planned_mebibytes": planned.peak_bytes / MEBI,
        "mebibytes": peak_memory(torch.device("cpu")) / MEBI,
        "planned_seconds": planned.seconds,
        "seconds": time.perf_counter() - start,
        "matvecs": pairs.num_matvecs,
        "status": pairs.status.name,
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residual_norms": pairs.residual_norms.tolist(),
    }


def layers_row(model: str, num_probes: int) -> dict[str, Any]:
    """Return the Hessian's trace in each transformer block, from one run, and what `plan` said before it."""
    from curvature import Objective, plan, spectrum
    from curvature.environment.cost import peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = PLAN_MODELS[model]()
    of = Objective(made[0], nn.CrossEntropyLoss(), (made[1], made[2]))
    planned = plan(of, ["layer_traces"], num_probes=num_probes)
    start = time.perf_counter()
    found = spectrum(of, planned.plan, generator=0, progress=lambda n: print(n, file=sys.stderr))
    seconds = time.perf_counter() - start
    samples: dict[str, torch.Tensor] = {}
    assert found.layer_trace_samples is not None
    for block, sample in zip(of.space.blocks, found.layer_trace_samples, strict=True):
        inner = re.search(r"\.h\.(\d+)\.", block.name)
        name = f"block {inner[1]}" if inner else block.name
        samples[name] = samples.get(name, torch.zeros(num_probes, dtype=torch.float64)) + sample
    return {
        "part": "layers",
        "model": model,
        "matvecs": found.num_matvecs,
        "planned_matvecs": planned.num_matvecs,
        "planned_seconds": planned.seconds,
        "seconds": seconds,
        "planned_mebibytes": planned.peak_bytes / MEBI,
        "mebibytes": peak_memory(torch.device("cpu")) / MEBI,
        "traces": {name: sample.mean().item() for name, sample in samples.items()},
        "stderrs": {name: sample.std().item() / num_probes**0.5 for name, sample in samples.items()},
    }
