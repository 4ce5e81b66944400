"""Hessian products in the adapters of a frozen GPT-2, beside plain double backward in them and products in all weights.

The adapters are those of peft where it is installed, else the same written out: x A'B' beside each attention's input
projection, of rank 8.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ADAPTERS", "adapters_row"]

RANK, ROUNDS, TOKENS, VOCABULARY = 8, 7, 128, 10_000
ADAPTERS = ("peft", "written out")


class _Adapted(nn.Module):
    def __init__(self, base: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def _model(adapter: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    model: nn.Module = GPT2LMHeadModel(config).eval()
    if adapter == "peft":
        peft = importlib.import_module("peft")
        lora = peft.LoraConfig(r=RANK, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).eval()
    else:
        model.requires_grad_(False)
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.attn.c_attn = _Adapted(block.attn.c_attn, config.n_embd, 3 * config.n_embd)
    with torch.no_grad():  # B starts at zero, which would hide half of the Hessian
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def adapters_row(adapter: str) -> dict[str, Any]:
    """Return the cost of a product in the adapters, and in all weights, in plain products in the adapters.

    Each round takes one of each; the figures are medians of ratios of process CPU time. Graphs are kept by all.
    """
    from curvature import GGNOperator, HessianOperator
    from curvature.adapters.hugging_face import causal_lm_objective

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _model(adapter)
    ids = torch.randint(VOCABULARY, (4, TOKENS))
    batches = [{"input_ids": ids, "labels": ids}]
    chosen = [p for name, p in model.named_parameters() if "lora_" in name]
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradient = torch.autograd.grad(loss, chosen, create_graph=True)
    objective = causal_lm_objective(model, batches, params="*.lora_*", keep_graphs=True)
    v = torch.randn(objective.num_params)
    parts = [part.view(p.shape) for part, p in zip(v.split([p.numel() for p in chosen]), chosen, strict=True)]

    def plain() -> Tensor:
        return torch.cat([h.flatten() for h in torch.autograd.grad(gradient, chosen, parts, retain_graph=True)])

    H, G = HessianOperator(objective), GGNOperator(objective)
    every = HessianOperator(causal_lm_objective(model, batches, params="*", keep_graphs=True))
    w = torch.randn(every.shape[0])
    error = float((H @ v - plain()).norm() / plain().norm())
    products: dict[str, Callable[[], Tensor]] = {
        "plain": plain,
        "hessian": lambda: H @ v,
        "ggn": lambda: G @ v,
        "whole": lambda: every @ w,
    }
    taken: dict[str, list[float]] = {name: [] for name in products}
    for counts in (False, *[True] * ROUNDS):
        for name, product in products.items():
            begun = time.process_time()
            product()
            taken[name] += [time.process_time() - begun] * counts
    of_plain = {
        name: statistics.median(a / b for a, b in zip(taken[name], taken["plain"], strict=True)) for name in products
    }
    return {
        "part": "adapters",
        "adapter": adapter,
        "num_params": objective.num_params,
        "num_all": every.shape[0],
        "error": error,
        "plain_seconds": statistics.median(taken["plain"]),
        "hessian_of_plain": of_plain["hessian"],
        "ggn_of_plain": of_plain["ggn"],
        "whole_of_plain": of_plain["whole"],
    }
