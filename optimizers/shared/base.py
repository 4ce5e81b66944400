"""What all optimizers share: settings and their checks, and a state from which a run goes on bit for bit.

torch keeps the averages of low-precision parameters in their dtype, shares memory with the state it loads, and leaves
all attributes out of copies. Here averages keep their dtype, what is loaded is copied, and copies are whole.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.errors import InputError
from curvature.losses.recognised import loss_rule
from curvature.losses.rules import LossRule
from curvature.objective.shards import is_part
from optimizers.shared.differentiation import ClosureRecorder
from optimizers.shared.gradients import UNREACHED, Followed, Seen
from optimizers.shared.ranks import refuse_wrapper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["COUNTERS", "BaseOptimizer", "Common", "Group", "Shared", "check_choice"]

Group = dict[str, Any]  # the settings of a parameter group
COUNTERS = ("step", "hessian_step")
"""State that counts: float32 scalars, on the host unless `capturable`."""


class Common(TypedDict, total=False):
    """Arguments that optimizers share, by keyword."""

    loss: Callable[..., Tensor] | None  # `loss(outputs, targets)`, for closures that return both. Default: None.
    process_group: ProcessGroup | None
    """Ranks that hold parts of each batch. They count by their loss terms where closures return (outputs, targets), and
    alike where they return the loss. Default: None."""
    maximize: bool  # climb instead of descend. Default: False.
    seed: int
    """Of the random numbers, which are functions of (seed, step, sample); the same in all groups. Default: 0."""


class Shared(Common, total=False):
    """Further ones of diagonal methods."""

    check_finite: bool
    """Raise on a loss or a measured curvature that is not finite, instead of storing it for good. On a GPU only steps
    with curvature look, as looking waits for the device; under a scaler the scaler does it. Default: True."""
    update_first: int
    """Curvature is measured on each of the first so many steps of the group, beside every `update_every`-th. With a
    large `update_every` 20 or so keep the beginning from resting on one measurement, which may be far too small.
    Default: 1."""
    foreach: bool | None
    """False updates one tensor at a time, the reference; None, the default, and True update lists of tensors."""
    capturable: bool
    """Keep counters on the parameters' device, so that an update never waits for it. A step at which curvature is due
    cannot be captured in a CUDA graph; the others can. Default: False."""


class BaseOptimizer(torch.optim.Optimizer):
    """Settings, parameter groups and state of every optimizer here."""

    _kept: tuple[str, ...] = ("loss", "_group_name")
    """Attributes that copies and pickles keep, beside settings and state."""
    _late_settings: ClassVar[dict[str, Any]]
    """Settings with defaults, which groups saved before these existed are given."""
    _least: ClassVar[dict[str, float]] = {}  # setting -> its least value
    _counts: tuple[str, ...] = ()  # settings that must be integers >= 1
    _fractions: tuple[str, ...] = ()  # settings in [0, 1)
    _positive: tuple[str, ...] = ()  # settings that must be positive and finite
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # setting -> its values
    _alike: tuple[str, ...] = ("seed",)  # settings that one computation for all groups follows: the same in each
    _not_alike: tuple[str, ...] | None = None  # or: all settings but these
    _takes_parts = False  # whether parameters may be DTensors
    _group: ProcessGroup | None
    _group_name: str | None
    _seen: Seen | None = None  # gradients at the end of the last step
    _followed: Followed | None = None  # gradients that belong to what was accumulated for the coming step

    def __init__(self, params: Any, defaults: Group, **shared: Any) -> None:
        self.loss = shared.pop("loss", None)
        _ = self._rule  # refuses a loss that is none
        self.process_group = shared.pop("process_group", None)
        if unknown := shared.keys() - self._late_settings.keys():
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        self._forget()
        super().__init__(params, {**self._late_settings, **defaults, **shared})

    @property
    def _rule(self) -> LossRule | None:
        """How the loss reduces and curves now: its reduction or hooks may have been changed."""
        return None if self.loss is None else loss_rule(self.loss)

    @cached_property
    def _recorder(self) -> ClosureRecorder:
        return ClosureRecorder()

    def _no_wrapper_alone(self) -> contextlib.AbstractContextManager[Any]:
        """Refuse closures that call `DistributedDataParallel` where no ranks are joined here.

        What is not computed by `backward()` passes the hooks of the wrapper by, so that ranks would part in silence.
        """
        if self.process_group is not None:
            return contextlib.nullcontext()
        return refuse_wrapper(type(self).__name__, "Pass process_group= to it, e.g. torch.distributed.group.WORLD.")

    def _forget(self) -> None:
        """Drop what was accumulated for the coming step, and what is worked out anew when it is asked for."""
        self._forget_measured()

    # -- whether gradients reach the parameters -----------------------------------------------------------------------

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _none_reached(self) -> bool:
        trained = self._trained()
        return bool(trained) and all(p.grad is None for p in trained)

    def _refuse_unreached(self) -> None:
        """Refuse a loss that gave no parameter a gradient: the optimizer would stand still."""
        if self._none_reached():
            raise InputError(f"the loss gives none of the optimizer's parameters a gradient. {UNREACHED}")

    @_disable_dynamo
    def _look_for_gradients(self, *, computed: bool, old: bool) -> None:
        """Refuse a loss that was computed for this step and reached no parameter; warn where `.grad` holds nothing new.

        torch takes both in silence. Where the parameters of a part of the model were replaced and others are reached,
        nobody is told: that part looks as if the loss did not use it.
        """
        if computed:
            self._refuse_unreached()
        elif old:
            _warn(
                "step() found the gradients of the step before: no backward pass has reached the optimizer's "
                f"parameters since, and they move by an old gradient. {UNREACHED}"
            )
        elif self._none_reached():
            _warn(f"step() found no gradient in any parameter, and nothing moves. {UNREACHED}")

    @_disable_dynamo
    def _see_gradients(self) -> None:
        """Remember the gradients that the end of a step, or of zero_grad, leaves behind."""
        self._seen = Seen(self._trained())

    def _has_old_gradients(self) -> bool:
        """Whether all gradients in `.grad` lay there at the end of the last step."""
        return self._seen is not None and self._seen.all_still(self._trained())

    def _follow(self, *, came: bool, looks: bool = True) -> None:
        """Follow the gradients that belong to what was measured: those that came with it, or those to come."""
        self._followed = self._followed or Followed()
        to_come = not came and (self._none_reached() or self._has_old_gradients())
        self._followed.take(self._trained(), to_come=to_come, looks=looks)

    @_disable_dynamo
    def _forget_if_cleared(self) -> None:
        """Gradients that were cleared since, by `model.zero_grad()`, take what was measured beside them with them."""
        if self._followed is not None and self._followed.cleared(self._trained()):
            self._forget_measured()

    def _forget_measured(self) -> None:
        """Drop what was measured beside gradients for the coming step."""
        if self._followed is not None:
            self._followed.end()
        self._followed = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and what was accumulated beside them."""
        super().zero_grad(set_to_none)
        self._forget_measured()
        if not set_to_none:
            self._see_gradients()

    # -- settings -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a check of its settings."""
        super().add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def _validate(self, group: Group) -> None:
        """Check the settings of one group."""
        for p in group["params"]:
            if is_part(p) and not self._takes_parts:
                raise InputError(
                    "these parameters are DTensors, of which each rank holds a part: call optimizers.Sharded(model, "
                    f"{type(self).__name__}, ...) with the model instead."
                )
            if p.is_complex() or not p.is_floating_point():
                raise InputError(
                    f"parameters must be real floating point, got {p.dtype}; view a complex one by torch.view_as_real."
                )
        lr, seed = group["lr"], group.get("seed", 0)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise InputError(f"a tensor lr must have one entry, got shape {tuple(lr.shape)}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed must be an integer, got {seed!r}.")
        for name, least in {"lr": 0.0, **self._least}.items():
            if not _number(name, group[name]) >= least:
                raise InputError(f"{name} must be a number >= {least:g}, got {group[name]!r}.")
        for name in self._counts:
            if isinstance(group[name], bool) or not isinstance(group[name], int) or group[name] < 1:
                raise InputError(f"{name} must be an integer >= 1, got {group[name]!r}.")
        for name in self._fractions:
            if not 0 <= _number(name, group[name]) < 1:
                raise InputError(f"{name} must be in [0, 1), got {group[name]}.")
        for name in self._positive:
            if not 0 < _number(name, group[name]) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {group[name]}.")
        for name, allowed in self._choices.items():
            check_choice(name, group[name], allowed)
        self._refuse_unlike(group)
        betas = group.get("betas", (0.0, 0.0))
        two = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not two or not all(0 <= _number("betas", beta) < 1 for beta in betas):
            raise InputError(f"betas must be two numbers in [0, 1), got {betas!r}.")

    def _refuse_unlike(self, *groups: Group) -> None:
        """Refuse settings that must be those of the first group; users assign to groups, so before steps, too."""
        first = self.param_groups[0]
        names = self._alike
        if self._not_alike is not None:
            names = tuple(name for name in self.defaults if name not in self._not_alike)
        for group in groups:
            for name in names:
                here, there = group.get(name), first.get(name)
                if here != there:
                    raise InputError(
                        f"{name} must be the same in all groups, which move together, got {here!r} and "
                        f"{there!r}: set it for all, or give the groups optimizers of their own. lr may differ."
                    )

    # -- state --------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its dtypes: torch would round averages to the dtype of low-precision parameters."""
        seen: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, state: seen.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ours = [(p, group) for group in self.param_groups for p in group["params"]]
        theirs = [index for group in seen[-1]["param_groups"] for index in group["params"]]
        for index, (p, group) in zip(theirs, ours, strict=True):
            for key, value in seen[-1]["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    on_host = key in COUNTERS and not (group.get("capturable") or group.get("fused"))
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

    # -- ranks --------------------------------------------------------------------------------------------------------

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


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is not among the allowed names."""
    if value not in tuple(allowed):
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be one number, got {value!r}.") from None


_OURS = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


def _warn(text: str) -> None:
    """Warn at the line that called a step: Python shows a warning once a line, and a wrapper's serves all steps."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
