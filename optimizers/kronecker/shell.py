"""The shell of every optimizer that preconditions matrices: what is not the method itself.

Matrices go to the method, everything else to AdamW inside. The shell decides which is which, takes gradients from
`.grad` or from a closure, averages them over ranks, shares the method's work out among ranks, and applies weight decay
and learning rate. What a run needs to be resumed bit for bit lies in `state_dict()`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from curvature.autograd.backward import no_autocast
from curvature.environment.precision import tf32_off
from curvature.errors import InputError
from optimizers.kronecker.adamw import adamw, adamw_state
from optimizers.kronecker.work_split import WorkSplit, add_whole, whole_of
from optimizers.shared.base import Common, Group
from optimizers.shared.gradient_steps import GradientOptimizer
from optimizers.shared.gradients import refuse_gradients, refuse_sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["MatrixCommon", "MatrixOptimizer", "Routed"]

State = dict[str, Tensor]


class MatrixCommon(Common, total=False):
    """Arguments that matrix optimizers share, by keyword."""

    method: str
    """Which parameters of a group the method gets: "auto", the default, all that it can take; "matrix" all, and those
    that it cannot take are refused; "adamw" none. Embeddings and heads are commonly given to AdamW."""
    adamw_scale: float  # learning rate of AdamW inside, in units of lr, so that schedulers move both. Default: 1.
    adamw_betas: tuple[float, float] | None  # of AdamW inside; None, the default, takes betas
    check_finite: bool
    """Refuse gradients that are not finite, before they are averaged for good. On a GPU that waits for the device, so
    there False leaves it to a scaler or to clipping. Default: True."""
    foreach: bool | None  # False updates one tensor at a time, the reference. Default: None, lists of tensors.


@dataclass
class Routed:
    """The parameters of a group that the method moves on this rank and in this step.

    Attributes:
        group: its settings, `lr` as a number.
        params: as the optimizer holds them.
        grads: whole gradients in the shapes of the parameters, float32 or wider, negative under `maximize`.
        states: of each parameter; `step` has counted this step.
    """

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]

    def one_by_one(self) -> list[Routed]:
        """Return each parameter by itself."""
        return [Routed(self.group, [p], [g], [s]) for p, g, s in zip(self.params, self.grads, self.states, strict=True)]


class MatrixOptimizer(GradientOptimizer):
    """Base of optimizers that move matrices by a method of their own, and everything else by AdamW.

    Ways to take a step, which do the same:

        loss.backward()                                       # as with any optimizer; micro-batches accumulate in .grad
        clip_grad_norm_(model.parameters(), 1.0)              # optional
        optimizer.step()

        optimizer.step(closure)                               # closure returns the loss; backward() is called for it,
                                                              # unless it did so itself

    A subclass says which parameters it takes (`_takes`), what state they start with (`_matrix_state`), and which way
    they go (`_directions`); the shell then moves theta <- theta - lr (direction + weight_decay theta). A matrix is a
    parameter with two or more dimensions, the later ones taken together: a convolution's weight is its output channels
    by all the rest. `routes()` says which parameter goes where, and why.

    Ranks: with `process_group=`, gradients are averaged over it (those that `DistributedDataParallel` has averaged stay
    as they are), and each matrix is the work of one rank, which alone holds its factors and hands its direction to the
    others. Parameters that `fully_shard` or tensor parallelism has split (DTensors) are handed in as they are: AdamW
    works on the parts; a matrix's gradient is gathered, and its work split likewise over the ranks of its mesh. The
    update is that of one process. States are saved and loaded by `torch.distributed.checkpoint`, on any number of
    ranks; `state_dict()` of one rank holds the factors of its own matrices.

    Args:
        params: parameters, named parameters, or groups of them.
        defaults: settings of the method, kept in every group: `lr`, `betas`, `eps`, `weight_decay` and its own.
        shared: see `MatrixCommon` and `Common`.

    Raises:
        InputError: for settings out of range, complex parameters, sparse gradients, closures that return no loss.
        NonFiniteError: see `check_finite`; nothing has moved then.
    """

    _takes_parts = True
    _late_settings: ClassVar[dict[str, Any]] = {
        **{"method": "auto", "adamw_scale": 1.0, "adamw_betas": None, "maximize": False, "foreach": None, "seed": 0},
    }
    _least: ClassVar[dict[str, float]] = {"eps": 0.0, "weight_decay": 0.0, "adamw_scale": 0.0}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"method": ("auto", "matrix", "adamw")}
    _split: WorkSplit | None
    _shares_work = True  # whether ranks share the work out; else each does all of it, and has the whole state

    def __init__(self, params: Any, defaults: Group, **shared: Unpack[MatrixCommon]) -> None:
        super().__init__(params, defaults, **shared)

    # -- what a method supplies ---------------------------------------------------------------------------------------

    @abstractmethod
    def _refusal(self, p: Tensor, group: Group) -> str | None:
        """Return why the method cannot take a parameter, in a few words; None if it can."""

    @abstractmethod
    def _matrix_state(self, p: Tensor, group: Group) -> State:
        """Return the state that a parameter of the method starts with, beside `step`: tensors by name."""

    @abstractmethod
    def _directions(self, routed: Routed) -> list[Tensor]:
        """Return the direction of every parameter, in its shape and the dtype of its gradient; refresh its state."""

    def _units(self, group: Group) -> list[list[Tensor]]:
        """Return the parameters of the method in a group, those together that one rank has to work on."""
        return [[p] for p in group["params"] if self._is_matrix(p, group)]

    def _all_directions(self, routed: list[Routed]) -> list[list[Tensor]]:
        """Return the directions of all groups. A method that couples groups replaces this."""
        found = []
        for one in routed:
            parts = one.one_by_one() if one.group["foreach"] is False else [one] * bool(one.params)
            found.append([direction for part in parts for direction in self._directions(part)])
        return found

    # -- routes -------------------------------------------------------------------------------------------------------

    def _is_matrix(self, p: Tensor, group: Group) -> bool:
        return group["method"] != "adamw" and self._refusal(p, group) is None

    def routes(self) -> dict[str, str]:
        """Return which method moves each parameter, by name or by place, and why AdamW moves those it does.

        Example:
            >>> from optimizers import SOAP
            >>> SOAP(torch.nn.Linear(3, 2).named_parameters()).routes()
            {'weight': 'SOAP, 2 x 3', 'bias': 'AdamW: a vector'}
        """
        found = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                why = "by choice" if group["method"] == "adamw" else self._refusal(p, group)
                size = " x ".join(map(str, p.shape))
                found[name] = f"{type(self).__name__}, {size}" if why is None else f"AdamW: {why}"
        return found

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        betas = group["adamw_betas"]
        two = isinstance(betas, (tuple, list)) and len(betas) == 2
        if betas is not None and not (two and all(0 <= beta < 1 for beta in betas)):
            raise InputError(f"adamw_betas must be None or two numbers in [0, 1), got {betas!r}.")
        if group["method"] == "matrix":
            for p in group["params"]:
                if (why := self._refusal(p, group)) is not None:
                    raise InputError(
                        f'method="matrix" and a parameter of shape {tuple(p.shape)}: {why}. Give it a group with '
                        'method="adamw", or take "auto", which does so by itself.'
                    )

    # -- steps --------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        self._split = None

    def _move(self) -> None:
        """Move all parameters that have a gradient."""
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        refuse_sparse((p.grad for p in with_grad), type(self).__name__)
        if self.check_finite:
            refuse_gradients(with_grad, type(self).__name__)
        if not with_grad:
            return
        split, mine, groups = self._work_split(), [], []
        for settings in self.param_groups:
            group = {**settings, "lr": float(settings["lr"])}
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if self._is_matrix(p, group)]
            known = {id(p) for p in matrices}
            rest = [p for p in params if id(p) not in known]
            mine.append(self._routed(group, matrices, split))
            groups.append((group, matrices, rest))
        with tf32_off(), no_autocast(with_grad[0].device):
            directions = self._all_directions(mine)  # before anything moves: it may raise
        found = {id(p): d for r, ds in zip(mine, directions, strict=True) for p, d in zip(r.params, ds, strict=True)}
        for group, matrices, rest in groups:
            for p in rest:
                if not self.state[p]:
                    self.state[p].update(adamw_state(p))
            adamw(group, rest, [self.state[p] for p in rest])
            add_whole(matrices, split.gathered(matrices, found), group)

    @property
    def _working_group(self) -> ProcessGroup | None:
        return self.process_group if self._shares_work else None

    def _work_split(self) -> WorkSplit:
        if self._split is None or self._split.num_groups != len(self.param_groups):
            units = [self._units(group) for group in self.param_groups]
            self._split = WorkSplit(units, self._working_group)
        return self._split

    def _routed(self, group: Group, matrices: list[Tensor], split: WorkSplit) -> Routed:
        """Gather whole gradients, all ranks together, and return what is this rank's work."""
        grads = [whole_of(p, group["maximize"]) for p in matrices]
        for p in matrices:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                if split.is_mine(p):
                    state.update(self._matrix_state(p, group))
            elif split.is_mine(p) and len(state) == 1:
                raise InputError(
                    f"the state of a parameter of shape {tuple(p.shape)} holds no factors: it was saved on a rank that "
                    "had none of its work. Save and load by torch.distributed.checkpoint, which takes those of all."
                )
            state["step"] += 1
        chosen = [i for i, p in enumerate(matrices) if split.is_mine(p)]
        params = [matrices[i] for i in chosen]
        return Routed(group, params, [grads[i] for i in chosen], [self.state[p] for p in params])
