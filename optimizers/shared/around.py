"""Optimizers around another one, whose groups and state they share: they change the gradient that it steps with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from curvature.errors import InputError
from optimizers.shared.base import BaseOptimizer, Group

__all__ = ["AroundAnother"]


class AroundAnother(BaseOptimizer):
    """Base of optimizers around another, `base`; `state_dict()` holds both.

    Args:
        params: parameters or groups of them.
        base: the optimizer: one that steps on gradients in `.grad`.
        own: settings of the optimizer around it, kept in every group.
        settings: of base.
        shared: of `BaseOptimizer`.

    Raises:
        InputError: for a base that needs closures (LBFGS).
    """

    _kept = (*BaseOptimizer._kept, "base")
    base: torch.optim.Optimizer

    def __init__(
        self,
        params: Any,
        base: Callable[..., torch.optim.Optimizer],
        own: Group,
        settings: dict[str, Any],
        **shared: Any,
    ) -> None:
        inside = base(params, **settings)
        if inspect.signature(inside.step).parameters["closure"].default is inspect.Parameter.empty:
            raise InputError(
                f"base must step on gradients in `.grad`, and {type(inside).__name__}.step() needs a closure: take one "
                "such as torch.optim.AdamW, torch.optim.SGD or optimizers.SOAP."
            )
        super().__init__(inside.param_groups, {**inside.defaults, **own}, **shared)
        self.base = inside
        self._share()

    def _share(self) -> None:
        """Let base work on the groups and the state of this optimizer."""
        if "base" in self.__dict__:
            self.base.__setstate__({"param_groups": self.param_groups, "state": self.state})
            if isinstance(self.base, BaseOptimizer):
                self.base._forget()

    def _forget(self) -> None:
        super()._forget()
        self._share()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to both optimizers, after checks of its settings."""
        if "base" not in self.__dict__:
            super().add_param_group(param_group)
            return
        for name in self._late_settings:
            param_group.setdefault(name, self.defaults[name])
        self.base.add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise
