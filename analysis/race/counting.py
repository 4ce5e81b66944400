"""How much work a step is, in gradients: operations within the loss and its derivatives, whoever asks for them.

Counted are the operations of matrix products and convolutions, and one for each element that any other operation
writes, where they happen in a forward pass of the closure or in autograd's graph: products with curvature count as the
passes they are, an optimizer's own linear algebra does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Work"]


class Work(TorchDispatchMode):
    """Counts while it is active; `total` is in operations."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self._inside = 0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count what happens here, though it is not autograd's."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._inside or torch._C._current_graph_task_id() != -1:
            self.total += _operations(func, args, kwargs, out)
        return out


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=out))
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return 0.0  # a view
    parts = out if isinstance(out, (tuple, list)) else (out,)
    return float(sum(part.numel() for part in parts if isinstance(part, Tensor)))


def gradient_work(loss: Callable[[], Tensor], params: list[Tensor]) -> float:
    """Return the operations of one gradient: forward and backward pass."""
    with Work() as work:
        with work.forward(), torch.enable_grad():
            value = loss()
        torch.autograd.grad(value, params, allow_unused=True)
    return work.total if work.total > 0 else math.nan
