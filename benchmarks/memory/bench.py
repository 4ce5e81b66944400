"""Peak memory: of the 3 largest eigenpairs of a GPT-2 beside what is allowed, and of what `plan` predicts; adapters.

    python -m benchmarks.memory.bench [--parts ...] [--models ...] [--calls ...]      rows to results/memory.json

Each row is measured in a process of its own, above what that holds after a small call. Allowed: weights, kept graph and
num_basis + 4 vectors, and a fifth more.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.processes import alone
from benchmarks.common.suite import Rows, command
from benchmarks.memory.adapters import ADAPTERS, adapters_row
from benchmarks.memory.plans import CALLS, PLAN_MODELS, layers_row, limit_row, plan_row

__all__ = ["in_turn", "measure", "products"]

TIMEOUT_SECONDS = 2400
NUM_BASIS, TURNS = 8, 5
MEBI = 2**20
PARTS = ("bases", "products", "plans", "limit", "layers", "adapters")
LIMIT_SECONDS, LIMIT_BYTES = 7200, 6 * 10**9


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


def _product(method: str, tokens: int, **measures: Any) -> tuple[Callable[[], Tensor], int]:
    """Return a Hessian product of GPT-2, and how many parameters that has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from curvature import HessianOperator
    from curvature.adapters.hugging_face import causal_lm_objective

    torch.manual_seed(0)
    attention = "eager" if method == "plain" else "sdpa"
    model = GPT2LMHeadModel(GPT2Config(**{"attn_implementation": attention, **measures})).eval()
    ids, params = torch.randint(0, model.config.vocab_size, (4, tokens)), list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params), generator=torch.Generator().manual_seed(1))
    if method != "plain":
        H = HessianOperator(causal_lm_objective(model, [{"input_ids": ids, "labels": ids}]))
        return lambda: H @ v, len(v)
    parts = [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]

    def by_hand() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        return torch.cat([h.flatten() for h in torch.autograd.grad(gradient, params, parts)])

    return by_hand, len(v)


def in_turn() -> dict[str, Any]:
    """Return the CPU time of the toolkit's first product and of later ones in those of plain ones, made in turn."""
    torch.set_num_threads(1)
    for method in ("plain", "toolkit"):
        _product(method, 8, n_layer=1, n_embd=12, vocab_size=300, bos_token_id=0, eos_token_id=0)[0]()
    both = [_product(method, 128)[0] for method in ("plain", "toolkit")]
    ratios = []
    for _ in range(TURNS):
        taken = []
        for product in both:
            start = time.process_time()
            _ = product()
            taken.append(time.process_time() - start)
        ratios.append(taken[1] / taken[0])
    return {"part": "products", "method": "in turn", "first": ratios[0], "later": statistics.median(ratios[1:])}


def products(method: str) -> dict[str, Any]:
    """Return peak above the start and CPU seconds of Hessian products of GPT-2, the first and the median of later ones.

    "plain" is double backward by hand with eager attention, which builds the graph for each product.
    """
    from curvature.environment.cost import current_memory, peak_memory

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    _product(method, 8, n_layer=1, n_embd=12, vocab_size=300, bos_token_id=0, eos_token_id=0)[0]()
    product, num_params = _product(method, 128)
    before, seconds = current_memory(cpu), []
    for _ in range(4):
        start = time.process_time()
        norm = float(product().norm())
        seconds.append(time.process_time() - start)
    return {
        "part": "products",
        "method": method,
        "num_params": num_params,
        "norm": norm,
        "peak_mebibytes": (peak_memory(cpu) - before) / MEBI,
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    """Measure every row and write the file."""
    parser = command("memory", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=PLAN_MODELS, default=list(PLAN_MODELS))
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    a = parser.parse_args()
    bases = ("float32", "bfloat16") if "bases" in a.parts else ()
    plans = list(itertools.product(a.models, a.calls)) if "plans" in a.parts else []
    methods = ("plain", "toolkit", "in turn") if "products" in a.parts else ()
    adapters = ADAPTERS if "adapters" in a.parts else ()
    total = len(adapters) + len(bases) + len(plans) + len(methods) + ("limit" in a.parts) + ("layers" in a.parts)
    with Rows(a.out, ("part", "basis", "model", "call", "method", "adapter"), total) as rows:
        for method in methods:
            known = {"part": "products", "method": method}
            work, said = (in_turn, {}) if method == "in turn" else (products, {"method": method})
            row = alone(work, known, timeout_seconds=TIMEOUT_SECONDS, **said)
            rows.add(row, said=str(row))
        for basis in bases:
            row = alone(measure, {"basis": basis}, timeout_seconds=TIMEOUT_SECONDS, basis=basis)
            peak, allowed = row.get("peak_mebibytes", 0.0), row.get("allowed_mebibytes", 0.0)
            rows.add(row, said=f"{basis:9} {peak:6.0f} MiB at most, {allowed:6.0f} allowed")
        for adapter in adapters:
            known = {"part": "adapters", "adapter": adapter}
            row = alone(adapters_row, known, timeout_seconds=TIMEOUT_SECONDS, adapter=adapter)
            rows.add(row, said=str(row))
        if "limit" in a.parts:
            of = {"model": "gpt2-124m"}
            known = {"part": "limit", **of}
            row = alone(limit_row, known, timeout_seconds=LIMIT_SECONDS, limit_bytes=LIMIT_BYTES, **of)
            rows.add(row, said=str(row))
        if "layers" in a.parts:
            of = {"model": "gpt2-124m"}
            known = {"part": "layers", **of}
            row = alone(layers_row, known, timeout_seconds=LIMIT_SECONDS, num_probes=4, **of)
            rows.add(row, said=str(row))
        for model, call in plans:
            known = {"part": "plan", "model": model, "call": call}
            row = alone(plan_row, known, timeout_seconds=TIMEOUT_SECONDS, model=model, call=call)
            rows.add(row, said=str(row))


if __name__ == "__main__":
    main()
