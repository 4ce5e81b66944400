"""A plain training loop: the optimizer of a plan, batches, a step, and a model that is put back afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from analysis.records.plan import Plan, setting
from curvature.arguments import checked_fields
from curvature.data.parts import num_examples, take
from curvature.errors import InputError
from curvature.objective.objective import Objective
from optimizers.diagonal.adahessian import AdaHessian
from optimizers.kronecker.soap import SOAP
from optimizers.shared.base import BaseOptimizer

__all__ = [
    "MakeOptimizer",
    "Snapshot",
    "TrainingPlan",
    "batches_of",
    "initialise",
    "put_back",
    "take_step",
    "training_loss",
]

_EPOCHS = 1_000_003  # more than a training has: no epoch of a seed is one of another

MakeOptimizer = Callable[[list[Tensor], float], torch.optim.Optimizer]
"""`make(params, lr)` -> the optimizer."""


@checked_fields
@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """How to train."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "adahessian", "soap"] = setting(
        "sgd", "Optimizer, of torch.optim or of this toolkit."
    )
    momentum: float = setting(0.0, "Momentum of sgd and rmsprop.", least=0, below=1)
    nesterov: bool = setting(False, "Nesterov's momentum, of sgd.")
    beta1: float = setting(0.9, "Of adam, adamw, adahessian and soap.", least=0, below=1)
    beta2: float = setting(0.999, "Of the same; of rmsprop its alpha.", least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay of the optimizer.", least=0)
    batch_size: int | None = setting(
        None, "Train on batches of so many examples. Default: the batches of the task as they are.", least=1
    )
    fresh: bool = setting(False, "Initialise the parameters anew, by the seed, and do not go on from where they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise InputError("Nesterov's momentum goes with sgd and a momentum above 0.")
        if self.momentum > 0 and self.optimizer not in ("sgd", "rmsprop"):
            raise InputError(f"{self.optimizer} has no momentum; its beta1 is --beta1.")

    def make_optimizer(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        common: dict[str, Any] = {"lr": lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, momentum=self.momentum, nesterov=self.nesterov, **common)
        if self.optimizer == "rmsprop":
            return torch.optim.RMSprop(params, alpha=self.beta2, momentum=self.momentum, **common)
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(params, **common)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adahessian": AdaHessian, "soap": SOAP}
        return kind[self.optimizer](params, betas=(self.beta1, self.beta2), **common)


def take_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """Take a step of any optimizer and return the loss before it, detached.

    torch's own are given a closure that calls backward(), those of this toolkit one that does not.
    """
    step: Any = optimizer.step  # torch has closures return a float
    if isinstance(optimizer, BaseOptimizer):
        return cast("Tensor", step(loss).detach())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return cast("Tensor", step(closure).detach())


def batches_of(objective: Objective, size: int | None, seed: int, skip: int = 0) -> Iterator[Any]:
    """Yield batches without end, those of an epoch in an order that follows from its number."""
    if size is None:
        while True:
            for batch in objective.batches():
                if skip > 0:
                    skip -= 1
                else:
                    yield batch
    whole = list(objective.batches())
    count = num_examples(whole[0])
    if len(whole) > 1 or count == 0:
        raise InputError("batch_size cuts data that are one batch of tensors; leave it out for data that are several.")
    per_epoch = -(-count // size)
    epoch, first = divmod(skip, per_epoch)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_EPOCHS * seed + epoch))
        for rows in order.split(size)[first:]:
            yield take(whole[0], rows.tolist(), count)
        epoch, first = epoch + 1, 0


def training_loss(objective: Objective, batch: Any) -> Tensor:
    """Return the loss of a batch as training has it."""
    model, forward, loss = objective.model, objective.settings["forward"], objective.settings["loss"]
    found: Any = (model(batch[0]), batch[1]) if forward is None else forward(model, batch)
    value: Tensor = found if loss is None else loss(*found)
    return value


def initialise(model: nn.Module) -> None:
    """Draw all parameters anew, as their modules do; kept weights of masked ones as those of the whole tensor.

    Raises:
        InputError: for a module that holds parameters and cannot draw them.
    """
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and parametrize.is_parametrized(module):
            _reset_masked(module)
        elif callable(reset):
            reset()
        elif isinstance(module, parametrize.ParametrizationList) and _masks(module):
            continue  # set by the module that it belongs to
        elif module._parameters:
            raise InputError(
                f"the module {name or type(model).__name__!r} has no reset_parameters(); let the task's function "
                "return the model as it is to start, and leave --fresh out."
            )


def _masks(parts: nn.Module) -> bool:
    return all(hasattr(part, "mask") and hasattr(part, "right_inverse") for part in parts.children())


def _reset_masked(module: nn.Module) -> None:
    """Draw the tensors that the module sees, and keep of them what is kept; others than masks stay as they are."""
    keys = [key for key, parts in cast("nn.ModuleDict", module.parametrizations).items() if _masks(parts)]
    with parametrize.cached():
        cast("Any", module).reset_parameters()
        drawn = {key: getattr(module, key).detach().clone() for key in keys}
    for key, value in drawn.items():
        setattr(module, key, value)  # by the right inverse


class Snapshot:
    """What a model holds: parameters, buffers that are saved and those that are not, and other saved state."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._saved = model, copy.deepcopy(model.state_dict())
        self._buffers = [
            (module, name, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back, into the same tensors where they are still there."""
        self._model.load_state_dict(self._saved)
        for module, name, value in self._buffers:
            present = module._buffers.get(name)
            if value is None or present is None or present.shape != value.shape or present.dtype != value.dtype:
                module._buffers[name] = None if value is None else value.clone()
            else:
                present.copy_(value)


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[Snapshot]:
    """Restore parameters, buffers, gradients and modes after a training; give what the model held before."""
    before = Snapshot(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield before
    finally:
        before.restore()
        for module, training in modes:
            module.training = training
        for p, gradient in gradients:
            p.grad = gradient
