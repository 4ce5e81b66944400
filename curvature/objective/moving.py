"""Which module makes a model give something else each time?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvature.data.tensors import tensors_in
from curvature.objective.interface import ObjectiveLike

__all__ = ["moving_module"]


def moving_module(objective: ObjectiveLike) -> str:
    """Name the first module whose output differs between two runs although its inputs do not."""
    batch = next(iter(objective.batches()))
    first, second = _trace(objective, batch), _trace(objective, batch)
    for (name, kind, inputs, outputs), (_, _, inputs_again, outputs_again) in zip(first, second, strict=False):
        if _alike(inputs, inputs_again) and not _alike(outputs, outputs_again):
            return (
                f"the module {name!r} ({kind}) returns something else for the same input. It draws random numbers "
                "outside torch (numpy, random) or changes its own state in forward; make it deterministic (dropout "
                "and other torch random numbers are replayed, and buffers are guarded), or call model.eval()."
            )
    return (
        "every module repeats, so the loss, the forward function or the data move. Make the loss free of random "
        "numbers outside torch, and pass list(loader) to work on one fixed draw of the data."
    )


def _trace(objective: ObjectiveLike, batch: Any) -> list[tuple[str, str, list[Tensor], list[Tensor]]]:
    calls: list[tuple[str, str, list[Tensor], list[Tensor]]] = []
    handles = []
    for name, module in objective.model.named_modules():
        if any(module.children()):
            continue

        def record(m: nn.Module, inputs: Any, outputs: Any, name: str = name) -> None:
            copies = [[t.detach().clone() for t in tensors_in(part)] for part in (inputs, outputs)]
            calls.append((name, type(m).__name__, copies[0], copies[1]))

        handles.append(module.register_forward_hook(record))
    try:
        objective.linearise(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _alike(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    return len(xs) == len(ys) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
