"""Readings of gradient noise and implicit regularization over a training run: what a figure of it is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.results.record import Result

__all__ = ["TrainingReading", "TrainingRecord"]


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingReading(Result):
    """The state of a run at one step."""

    step: int
    """Where in the run it was taken."""
    lr: float
    """Learning rate then."""
    loss: float
    """C on the monitor's data, weight decay included; loss."""
    full_penalty: float
    """What finite steps add by the full gradient; loss."""
    batch_penalty: float
    """What they add by the noise of batches; loss."""
    gradient_norm: float
    """|g|; loss / parameter."""
    trace: float
    """Tr S of single examples' gradients; (loss / parameter)^2."""
    noise_scale: float
    """B_simple, in examples; negative where the mean gradient is below its noise."""
    noise_scale_lower: float
    """Lower end of its interval, in examples."""
    noise_scale_upper: float
    """Upper end; may be infinite."""
    evidence: float
    """Of the stopping criterion of Mahsereci et al.; above 0, training on these data may stop."""
    seconds: float
    """Wall clock of the reading."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingRecord(Result):
    """All readings of a run, in the order they were taken."""

    readings: tuple[TrainingReading, ...]
    """One a call of the monitor."""
    batch_size: int
    """Of the training, in examples."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that the readings are filed under."""
        return tuple(reading.step for reading in self.readings)

    def series(self, field: str) -> Tensor:
        """Return one field of all readings, (R,), float64."""
        return torch.tensor([getattr(reading, field) for reading in self.readings], dtype=torch.float64)
