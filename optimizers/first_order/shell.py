"""The shell of methods that move every entry of a parameter by its own gradient: Lion, Yogi, COCOB, a learned rule."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from curvature.autograd.backward import no_autocast
from optimizers.shared.base import Common, Group
from optimizers.shared.gradient_steps import GradientOptimizer
from optimizers.shared.gradients import local, refuse_gradients, refuse_sparse

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Elementwise", "ElementwiseCommon", "States"]

States = dict[str, list[Tensor]]


class ElementwiseCommon(Common, total=False):
    """Arguments that elementwise methods share, by keyword."""

    check_finite: bool
    """Refuse gradients that are not finite, before they are averaged for good. On a GPU that waits for the device, so
    there False leaves it to a scaler or to clipping. Default: True."""
    foreach: bool | None  # False updates one tensor at a time. Default: None, lists of tensors.


class Elementwise(GradientOptimizer):
    """Base of methods that treat every entry alike.

    Steps are taken on gradients in `.grad`, or by `step(closure)`; averages are kept in float32 or wider, and
    parameters of low precision are moved in float32 and rounded once. With `process_group=`, gradients are averaged
    over it. Parameters in parts (`fully_shard`, tensor parallelism) are handed in as they are: each rank moves its own.

    A subclass names its averages and supplies `_update`, on lists of tensors.
    """

    _takes_parts = True
    _late_settings: ClassVar[dict[str, Any]] = {"maximize": False, "foreach": None, "seed": 0}
    _averages: ClassVar[tuple[str, ...]] = ()  # state, beside `step`, that begins with zeros

    def __init__(self, params: Any, defaults: Group, **shared: Unpack[ElementwiseCommon]) -> None:
        super().__init__(params, defaults, **shared)

    @abstractmethod
    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """Move parameters by their gradients, all float32 or wider."""

    def _begin(self, group: Group, at: tuple[Tensor, Tensor], state: dict[str, Tensor]) -> None:
        """Fill the averages of a parameter where they do not begin with zeros; `at` is it and its first gradient."""

    def _move(self) -> None:
        """Move all parameters that have a gradient."""
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        refuse_sparse((p.grad for p in with_grad), type(self).__name__)
        if self.check_finite:
            refuse_gradients(with_grad, type(self).__name__)
        for settings in self.param_groups:
            group = {**settings, "lr": float(settings["lr"])}
            params = [p for p in group["params"] if p.grad is not None]
            for part in [[p] for p in params] if group["foreach"] is False else [params] * bool(params):
                with no_autocast(part[0].device):
                    self._move_part(group, part)

    def _move_part(self, group: Group, params: list[Tensor]) -> None:
        first = [i for i, p in enumerate(params) if not self.state[p]]
        for i in first:
            self.state[params[i]].update(self._new_state(params[i]))
        own = [local(p) for p in params]
        wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in own]
        grads = [local(p.grad, like=p).to(w.dtype) for p, w in zip(params, wide, strict=True) if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        states = {name: [local(self.state[p][name]) for p in params] for name in ("step", *self._averages)}
        for step in states["step"]:
            step += 1
        for i in first:
            self._begin(group, (wide[i], grads[i]), {name: tensors[i] for name, tensors in states.items()})
        if group.get("weight_decay", 0.0) != 0:
            torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
        self._update(group, wide, grads, states)
        for p, w in zip(own, wide, strict=True):
            if p is not w:
                p.copy_(w)

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        return state | {name: torch.zeros_like(p, dtype=dtype) for name in self._averages}
