"""Saving, loading, copying and pickling an optimizer so that it goes on bit for bit.

torch keeps the averages of low-precision parameters in their dtype, shares memory with the state it loads, and leaves
all attributes out of copies. Here averages keep their dtype, what is loaded is copied, and copies are whole.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.errors import InputError
from optimizers.shared.differentiation import ClosureRecorder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["COUNTERS", "ResumableOptimizer"]

COUNTERS = ("step", "hessian_step")
"""State that counts: float32 scalars, on the host unless `capturable`."""

_DEFAULTS: dict[str, Any] = {
    "update_first": 1,
    "update_every": 1,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "seed": 0,
    "num_steps": 0,
    "num_refreshes": 0,
}
_KEPT = ("curvature", "loss", "check_finite", "_rule", "_group_name")


class ResumableOptimizer(torch.optim.Optimizer):
    """What `CurvatureOptimizer` does about its state."""

    _kept: tuple[str, ...] = _KEPT
    """Attributes that copies and pickles keep, beside settings and state."""
    _late_settings: dict[str, Any] = _DEFAULTS
    """Settings that groups saved before these existed are given."""
    _group: ProcessGroup | None
    _group_name: str | None

    @cached_property
    def _recorder(self) -> ClosureRecorder:
        return ClosureRecorder()

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was accumulated for the coming step beside `.grad`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its dtypes: torch would round averages to the dtype of low-precision parameters."""
        seen: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, state: seen.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ours = [p for group in self.param_groups for p in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        theirs = [index for group in seen[-1]["param_groups"] for index in group["params"]]
        for index, p, group in zip(theirs, ours, groups, strict=True):
            for key, value in seen[-1]["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    on_host = key in COUNTERS and not group.get("capturable", False)
                    self.state[p][key] = value.detach().to("cpu" if on_host else p.device, copy=True)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Keep what torch leaves out, but for what belongs to a step half taken."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for counters in self.state.values():  # states saved with plain numbers
            for key in COUNTERS:
                if key in counters and not isinstance(counters[key], Tensor):
                    counters[key] = torch.tensor(float(counters[key]), dtype=torch.float32)
        for group in self.param_groups:
            for name, value in self._late_settings.items():
                group.setdefault(name, value)
        if "_group" not in self.__dict__:
            self._group = None
            self._forget()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that are averaged over. A copy or a pickle finds its group again by name."""
        if self._group is None and self._group_name is not None:
            if not dist.is_initialized():
                raise InputError(
                    f"the optimizer belongs to the process group {self._group_name!r} and torch.distributed is not "
                    "initialised; initialise it, or set optimizer.process_group = None."
                )
            from torch._C._distributed_c10d import _resolve_process_group  # not in every build

            self._group = _resolve_process_group(self._group_name)  # type: ignore[arg-type]
        return self._group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._group_name = None if group is None else group.group_name
