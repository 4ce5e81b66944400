"""A task: a model, a loss and the data they are looked at on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import TaskError

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model at the point of interest, its loss, and the data.

    Either `loss` and `train_data` are given, or `prepared`: the objective itself, where a user's function returned one.
    """

    name: str
    """What it is called: a bundled name, or the reference it was loaded from."""
    model: nn.Module
    """In the mode (train or eval) it is to be inspected in."""
    description: str = ""
    """One sentence for a report."""
    loss: Callable[..., Tensor] | None = None
    """`loss(outputs, targets)` -> scalar."""
    train_data: Any = None
    """What the objective is defined on: one (inputs, targets) pair, a list of them, or a re-iterable loader."""
    test_data: Any = None
    """Held out data of the same structure; None if there are none."""
    checkpoint: Path | None = None
    """Where the parameters were loaded from; None if the function that made the task set them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint states: split sizes, losses and accuracies, how it was trained. Plain values."""
    checkpoint_record: Mapping[str, str] | None = None
    """File name, digest and key of the checkpoint as it was read."""
    prepared: Objective | None = None
    """The objective, where it was given ready-made."""

    def __post_init__(self) -> None:
        if self.prepared is None and (self.loss is None or self.train_data is None):
            raise TaskError(f"task {self.name!r} needs loss= and train_data=, or prepared= with a ready Objective.")

    def objective(self, **settings: Any) -> Objective:
        """Return the training loss as an objective of the model's parameters.

        Args:
            **settings: as `curvature.Objective` takes them (`params`, `keep_graphs`, `memory_budget`, ...), and `data`,
                for other data of the task; None counts as not given. A ready-made objective can only be restricted by
                `params`.

        Raises:
            TaskError: for any other setting of a ready-made objective.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        if self.prepared is None:
            return Objective(self.model, self.loss, given.pop("data", self.train_data), **given)
        params = given.pop("params", None)
        if given:
            raise TaskError(
                f"{self.name} returns a ready-made Objective, so {', '.join(given)} cannot be set from outside: "
                "set it there, or return an analysis.tasks.Task."
            )
        return self.prepared if params is None else self.prepared.restrict(params)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """Return a copy of the task with model and floating-point data on another device or in another dtype.

        Raises:
            TaskError: for a task with a ready-made objective, or with data that are no tensors in tuples and lists.
        """
        if self.prepared is not None:
            raise TaskError(f"{self.name} returns a ready-made Objective: move its model and data before it is built.")
        return replace(
            self,
            model=copy.deepcopy(self.model).to(device=device, dtype=dtype),
            train_data=_moved(self.train_data, device, dtype),
            test_data=_moved(self.test_data, device, dtype),
        )


def _moved(data: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if data is None:
        return None
    if isinstance(data, Tensor):
        return data.to(device=device, dtype=dtype if data.is_floating_point() else None)
    if isinstance(data, (list, tuple)):
        return type(data)(_moved(part, device, dtype) for part in data)
    raise TaskError(
        f"data of type {type(data).__name__} cannot be moved; pass tensors in tuples and lists, or move them before."
    )
