"""One step of any optimizer on a batch, with clipping, and how often the loss was evaluated."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from analysis.race.counting import Work
from analysis.race.kinds import Form
from analysis.tasks.digits import half_squared_error
from analysis.training.accuracy import outputs_of
from analysis.training.loop import training_loss
from curvature.errors import InputError
from curvature.losses.rules import SquaredError
from curvature.objective.objective import Objective

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of one training.

    Args:
        form: what the optimizer's step takes.
        optimizer: of the objective's parameters.
        objective: the loss.
        clip_norm: of the gradient before an update; None: not clipped.
        clip_value: of its entries.
        work: counts the operations of forward passes, where they are counted.

    Raises:
        InputError: where the optimizer cannot take such steps on such a loss.
    """

    def __init__(
        self,
        form: Form,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        work: Work | None = None,
    ) -> None:
        self.evaluations = 0
        self._form, self._optimizer, self._objective, self._work = form, optimizer, objective, work
        self._params = list(objective.space.tensors.values())
        self._norm, self._value = clip_norm, clip_value
        self._clips = clip_norm is not None or clip_value is not None
        loss, name = objective.settings["loss"], type(optimizer).__name__
        if form in ("outputs", "residuals") and loss is None:
            raise InputError(f"{name} takes outputs and targets, and this objective's forward returns the loss itself.")
        squares = isinstance(objective.rule, SquaredError) and objective.rule.settings.get("weight") is None
        if form == "residuals" and not (squares or loss is half_squared_error):
            raise InputError(f"{name} minimises squares of residuals; this loss is none: give one with nn.MSELoss.")
        hooked = "before_update" in inspect.signature(type(optimizer).step).parameters
        if self._clips and form not in ("backward", "closure") and not hooked:
            raise InputError(f"{name} computes its step from the gradient as it is, and takes no clipped one.")

    def step(self, batch: Any) -> Tensor:
        """Take a step and return the loss before it, detached."""
        step: Any = self._optimizer.step
        if self._form == "backward":
            loss = self._backward(batch)
            step()
            return loss.detach()
        if self._form == "closure":
            return torch.as_tensor(step(lambda: self._backward(batch))).detach()
        value = {"loss": training_loss, "outputs": outputs_of, "residuals": _residuals}[self._form]
        clip = {"before_update": self._clip} if self._clips else {}
        return cast("Tensor", step(lambda: self._evaluated(value, batch), **clip).detach())

    def _evaluated(self, value: Callable[..., Any], batch: Any) -> Any:
        self.evaluations += 1
        with contextlib.nullcontext() if self._work is None else self._work.forward():
            return value(self._objective, batch)

    def _backward(self, batch: Any) -> Tensor:
        self._optimizer.zero_grad()
        loss: Tensor = self._evaluated(training_loss, batch)
        loss.backward()
        self._clip()
        return loss

    def _clip(self) -> None:
        if self._norm is not None:
            clip_grad_norm_(self._params, self._norm)
        if self._value is not None:
            clip_grad_value_(self._params, self._value)


def _residuals(objective: Objective, batch: Any) -> Tensor:
    outputs, targets = outputs_of(objective, batch)
    return cast("Tensor", outputs - targets)
