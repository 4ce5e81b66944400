"""Peak memory: of the 3 largest eigenpairs of a GPT-2 beside what is allowed, and of what `plan` predicts.

    python -m benchmarks.memory.bench [--parts ...] [--models ...] [--calls ...]      rows to results/memory.json

Each row is measured in a process of its own, above what that holds after a small call. Allowed: weights, kept graph and
num_basis + 4 vectors, and a fifth more.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.common.processes import alone
from benchmarks.common.suite import Rows, command
from benchmarks.memory.plans import CALLS, PLAN_MODELS, plan_row

__all__ = ["measure"]

TIMEOUT_SECONDS = 900
NUM_BASIS = 8
MEBI = 2**20


def measure(basis: str) -> dict[str, Any]:
    """Return peak and parts, in MiB, with a basis of this dtype."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from curvature import Objective, eigsh
    from curvature.adapters.hugging_face import causal_lm_objective
    from curvature.environment.cost import current_memory, peak_memory

    def objective(layers: int, width: int, vocabulary: int) -> Objective:
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=layers, n_embd=width, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, n_head=12
        )
        model = GPT2LMHeadModel(config).eval()
        ids = torch.randint(0, vocabulary, (1, 32))
        return causal_lm_objective(model, [{"input_ids": ids, "labels": ids}])

    def pairs(of: Objective) -> int:
        narrow = None if basis == "float32" else getattr(torch, basis)
        found = eigsh(of, 3, rtol=0.05, max_matvecs=40, num_basis=NUM_BASIS, basis_dtype=narrow, generator=0)
        return found.num_matvecs

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    pairs(objective(1, 12, 300))
    before = current_memory(cpu)
    of = objective(4, 768, 10_000)
    products = pairs(of)
    vector, weights = 4 * of.num_params / MEBI, sum(p.nbytes for p in of.model.parameters()) / MEBI
    graph = of.held_bytes / MEBI
    return {
        "basis": basis,
        "products": products,
        "weights_mebibytes": weights,
        "graph_mebibytes": graph,
        "vector_mebibytes": vector,
        "peak_mebibytes": (peak_memory(cpu) - before) / MEBI,
        "allowed_mebibytes": 1.2 * (weights + graph + (NUM_BASIS + 4) * vector),
    }


def main() -> None:
    """Measure every row and write the file."""
    parser = command("memory", __doc__)
    parser.add_argument("--parts", nargs="+", choices=("bases", "plans"), default=["bases", "plans"])
    parser.add_argument("--models", nargs="+", choices=PLAN_MODELS, default=list(PLAN_MODELS))
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    a = parser.parse_args()
    bases = ("float32", "bfloat16") if "bases" in a.parts else ()
    plans = list(itertools.product(a.models, a.calls)) if "plans" in a.parts else []
    with Rows(a.out, ("part", "basis", "model", "call"), len(bases) + len(plans)) as rows:
        for basis in bases:
            row = alone(measure, {"basis": basis}, timeout_seconds=TIMEOUT_SECONDS, basis=basis)
            peak, allowed = row.get("peak_mebibytes", 0.0), row.get("allowed_mebibytes", 0.0)
            rows.add(row, said=f"{basis:9} {peak:6.0f} MiB at most, {allowed:6.0f} allowed")
        for model, call in plans:
            known = {"part": "plan", "model": model, "call": call}
            row = alone(plan_row, known, timeout_seconds=TIMEOUT_SECONDS, model=model, call=call)
            rows.add(row, said=str(row))


if __name__ == "__main__":
    main()
