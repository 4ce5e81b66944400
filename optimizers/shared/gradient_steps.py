"""Steps on what lies in `.grad`, or on a closure: what methods share that need one gradient a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.objective.shards import is_part
from optimizers.shared.base import BaseOptimizer, Group
from optimizers.shared.closures import backward_of
from optimizers.shared.ranks import average_gradients, on_all_ranks, share_of_rank

__all__ = ["GradientOptimizer"]


class GradientOptimizer(BaseOptimizer):
    """Base of optimizers that take one gradient a step, from `.grad` or from a closure, averaged over ranks."""

    _kept = (*BaseOptimizer._kept, "check_finite")

    def __init__(self, params: Any, defaults: Group, **shared: Any) -> None:
        self.check_finite = shared.pop("check_finite", True)
        super().__init__(params, defaults, **shared)

    @abstractmethod
    def _move(self) -> None:
        """Move all parameters that have a gradient."""

    @on_all_ranks
    @_disable_dynamo
    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, before_update: Callable[[], object] | None = None
    ) -> Any:
        """Take one step and return the closure's loss, detached; None without closure.

        Args:
            closure: returns the loss, or (outputs, targets) where `loss=` was given. It may call backward() itself, as
                closures of torch's optimizers do; else it is called here, and replaces what lies in `.grad`.
            before_update: called when gradients lie in `.grad`, before anything moves; for clipping.
        """
        self._refuse_unlike(*self.param_groups)
        loss, share = (None, 1.0) if closure is None else self._evaluated(closure)
        old = closure is None and self._has_old_gradients()
        self._synchronize(share)
        self._look_for_gradients(computed=isinstance(loss, Tensor), old=old)
        if before_update is not None:
            before_update()
        self._move()
        self._see_gradients()
        return loss

    def _evaluated(self, closure: Callable[[], Any]) -> tuple[Any, float]:
        """Return the loss, detached, and how much this rank's gradient counts; gradients lie in `.grad`."""
        loss, outputs, targets = backward_of(
            closure, [p for group in self.param_groups for p in group["params"]], self.loss
        )
        counts = self.process_group is not None and outputs is not None
        return loss, share_of_rank(self, outputs, targets) if counts else 1.0

    def _synchronize(self, share: float) -> None:
        if self.process_group is not None:
            average_gradients([p for p in self._trained() if not is_part(p)], self.process_group, share)
