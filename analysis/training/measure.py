"""The noise and the implicit regularization of a training run, measured as it goes, without its noticing.

A monitor is called wherever in a training loop a reading is wanted. Whatever a measurement touches is put back: the
random states of torch, NumPy and Python and of the loader of its data, buffers, gradients, and every module's mode.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from analysis.implicit.measure import implicit_regularization
from analysis.implicit.results import ImplicitRegularization
from analysis.noise.measure import gradient_noise
from analysis.noise.results import GradientNoise
from analysis.training.results import TrainingReading, TrainingRecord
from curvature.arguments import checked
from curvature.data.random_states import RandomStates, generators_of
from curvature.environment.lock import one_at_a_time
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.per_example import gradient_moments

__all__ = ["TrainingMonitor", "untouched"]


class TrainingMonitor:
    """Takes readings of gradient noise and implicit regularization at any step of a training loop.

    Each reading costs one pass of `gradient_moments` over the objective's data, 2 to 2.5 gradients of them where they
    are one batch; a fixed part of the training set keeps that small.

    Args:
        objective: on the model that is trained, with data of its own choice: a fixed part of the training set will do.
        lr: learning rate; a reading may override it.
        batch_size: of the training, in examples; a reading may override it.
        momentum: heavy-ball beta.
        weight_decay: of `torch.optim.SGD`.
        evaluation_mode: measure with dropout off and batch normalisation by its running statistics.

    Raises:
        InputError: for a batch size below 1.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> data = (torch.randn(8, 2), torch.randn(8, 1))
        >>> monitor = TrainingMonitor(Objective(model, nn.MSELoss(), data), lr=0.1, batch_size=4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(3):
        ...     _ = monitor(step)
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(data[0]), data[1]).backward()
        ...     optimizer.step()
        >>> monitor.record.steps
        (0, 1, 2)
    """

    @checked
    def __init__(
        self,
        objective: Objective,
        *,
        lr: float,
        batch_size: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        evaluation_mode: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        self.objective = objective
        self.lr = lr
        self.batch_size = batch_size
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.evaluation_mode = evaluation_mode
        self.noise: GradientNoise | None = None
        self.regularization: ImplicitRegularization | None = None
        self._readings: list[TrainingReading] = []

    @property
    def record(self) -> TrainingRecord:
        """All readings so far."""
        return TrainingRecord(readings=tuple(self._readings), batch_size=self.batch_size)

    def __call__(self, step: int, *, lr: float | None = None, batch_size: int | None = None) -> TrainingReading:
        """Take a reading at the model's present parameters, and add it to `record`.

        Args:
            step: number that the reading is filed under.
            lr: present learning rate, if a schedule moves it.
            batch_size: present batch size.

        Raises:
            DataError: as `gradient_noise`.
            NonFiniteError: if the loss is not finite.
        """
        rate, size = self.lr if lr is None else lr, self.batch_size if batch_size is None else batch_size
        clock = time.perf_counter()
        with untouched(self.objective, evaluation_mode=self.evaluation_mode):
            try:
                moments = gradient_moments(self.objective, along_mean=True)  # one for both
                noise = gradient_noise(self.objective, moments=moments)
                found = implicit_regularization(
                    self.objective,
                    lr=rate,
                    batch_size=size,
                    momentum=self.momentum,
                    weight_decay=self.weight_decay,
                    norms=moments,
                )
            finally:
                self.objective.release()  # graphs of a point that training leaves at once
        self.noise, self.regularization = noise, found
        reading = TrainingReading(
            step=step,
            lr=rate,
            loss=found.loss,
            full_penalty=found.full_penalty,
            batch_penalty=found.batch_penalty,
            gradient_norm=noise.mean_squared_norm**0.5,
            trace=noise.trace.value,
            noise_scale=noise.noise_scale.value,
            noise_scale_lower=noise.noise_scale.lower,
            noise_scale_upper=noise.noise_scale.upper,
            evidence=noise.evidence,
            seconds=time.perf_counter() - clock,
        )
        self._readings.append(reading)
        return reading


@contextlib.contextmanager
def untouched(objective: Objective, *, evaluation_mode: bool = True) -> Iterator[None]:
    """Put back, after what runs inside and also after an error, all that a measurement might move.

    Random states (torch on CPU and GPU, NumPy, Python, the generators of the objective's loader and its sampler), the
    model's buffers, gradients (the very tensors, and their values) and modes.

    Args:
        objective: whose model and data are looked after.
        evaluation_mode: switch the model to `eval()` inside.
    """
    with one_at_a_time, _put_back(objective, evaluation_mode):
        yield


@contextlib.contextmanager
def _put_back(objective: Objective, evaluation_mode: bool) -> Iterator[None]:
    model = objective.model
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    states = RandomStates([objective.device], generators_of(objective.settings["data"]))
    try:
        if evaluation_mode:
            for module, _ in modes:
                module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # a write also marks graphs of the training loop as overwritten
                    buffer.copy_(before)
            for p, gradient, values in gradients:
                p.grad = gradient
                if gradient is not None and values is not None and not torch.equal(gradient, values):
                    gradient.copy_(values)
        states.restore()
