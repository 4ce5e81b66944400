"""Readings of curvature and noise along a training run, and what follows from them about its stability."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.results.record import Result

__all__ = [
    "CriticalSharpness",
    "CriticalStatus",
    "EdgeOfStability",
    "GradientSmoothness",
    "LossSpike",
    "Phase",
    "TrainingReading",
    "TrainingRecord",
]

NAN = math.nan


class CriticalStatus(Enum):
    """How the search for the critical step ended."""

    OK = "bracketed"
    NO_BRACKET = (
        "the loss was still lower at the longest step that was tried; the sharpness is at most the number given"
    )
    ASCENT = "the loss rises along the update from the start: there is no critical step"
    ROUNDING = "the loss changes by no more than rounding along the update; evaluate in a wider dtype"

    @property
    def ok(self) -> bool:
        """Whether the critical step was found."""
        return self is CriticalStatus.OK


@dataclass(frozen=True, kw_only=True, repr=False)
class CriticalSharpness(Result):
    """How far along an update the loss stays below where it started."""

    value: float
    """2 / step; an upper bound where no bracket was found, NaN with the other statuses."""
    step: float
    """Learning rate at which the loss is back at where it started; a lower bound where no bracket was found."""
    lower: float
    """The loss is below its start at this learning rate, ..."""
    upper: float
    """... and not below it at this one; infinite if there was none."""
    num_losses: int
    """Forward passes over the data."""
    status: CriticalStatus
    """How the search ended."""


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientSmoothness(Result):
    """Loss and gradient within a few steps along the gradient."""

    loss_low: float
    """Lowest loss at the points looked at."""
    loss_high: float
    """Highest loss there; infinite where one was not finite."""
    gradient_change_low: float
    """Smallest distance of their gradients from that at the start; loss / parameter."""
    gradient_change_high: float
    """Largest distance: how far the gradient predicts what is ahead."""
    effective_smoothness: float
    """Largest change of the gradient over the distance gone; loss / parameter^2."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingReading(Result):
    """What was measured around one step; NaN where it was not asked for.

    All of it belongs to the parameters before the step, from which the step led away.
    """

    step: int
    """Steps that were taken before this one."""
    interval: int = 0
    """Steps since the reading before: how old that was just before this one; 0 at the first."""
    lr: float = NAN
    """Learning rate of the step, of the first group of parameters whose rate is not zero."""
    threshold: float = NAN
    """Largest curvature at which steps are stable: `stability_limit` / lr; loss / parameter^2 for SGD. NaN where the
    sharpness alone was measured and the optimizer has a preconditioner, or rates by group."""
    train_loss: float = NAN
    """The training loss that the loop passed on."""
    highest_loss: float = NAN
    """The highest of these since the reading before."""
    loss: float = NAN
    """Loss on the tracker's data."""
    gradient_norm: float = NAN
    """|g|; loss / parameter."""
    update_norm: float = NAN
    """|u|, u the step that was taken; parameter."""
    sharpness: float = NAN
    """Largest eigenvalue of the Hessian; loss / parameter^2."""
    sharpness_residual: float = NAN
    """|H v - sharpness v|: an eigenvalue lies within it."""
    preconditioned: float = NAN
    """Largest eigenvalue of P^-1 H, P what the optimizer divides by; where groups of parameters have other thresholds
    than the first, P holds the ratio, and parameters that the optimizer does not move are left out."""
    preconditioned_residual: float = NAN
    """Of its eigenvector."""
    sharpest_layer: str = ""
    """The layer that holds most of that eigenvector."""
    sharpest_layer_share: float = NAN
    """Its share of the squared norm."""
    alignment: float = NAN
    """|cosine| between the gradient and the eigenvector of the sharpness."""
    oscillation: float = NAN
    """Gradient along that eigenvector after the step over that before it: about -1 where it swings."""
    rayleigh: float = NAN
    """u'Hu / u'u; loss / parameter^2."""
    change: float = NAN
    """Loss after the step less that before it."""
    linear_change: float = NAN
    """g'u: what the gradient predicts of it."""
    quadratic_change: float = NAN
    """g'u + u'Hu / 2."""
    critical_sharpness: float = NAN
    """2 / lr_c, lr_c the learning rate at which this update would not lower the loss."""
    critical_status: str = ""
    """Name of its `CriticalStatus`."""
    relative: dict[str, float] = field(default_factory=dict)
    """The same on other losses, by name: their curvature along the update of this one."""
    relative_status: dict[str, str] = field(default_factory=dict)
    """Names of their statuses."""
    layers: dict[str, float] = field(default_factory=dict)
    """Largest eigenvalue of the diagonal block of each layer."""
    layer_residuals: dict[str, float] = field(default_factory=dict)
    """Of their eigenvectors."""
    layer_gradients: dict[str, float] = field(default_factory=dict)
    """|g| of each layer; loss / parameter."""
    layer_jacobians: dict[str, float] = field(default_factory=dict)
    """|d outputs / d layer|_F of each layer, per row of the outputs."""
    path_loss_low: float = NAN
    """Lowest loss at steps of 1/2 to 4 times |u| along the gradient, ..."""
    path_loss_high: float = NAN
    """... and highest."""
    gradient_change_low: float = NAN
    """Smallest change of the gradient on that way, ..."""
    gradient_change_high: float = NAN
    """... and largest; loss / parameter."""
    effective_smoothness: float = NAN
    """Largest change of the gradient over the distance gone; loss / parameter^2."""
    ritz_values: tuple[float, ...] = ()
    """Nodes of a Lanczos quadrature of the Hessian's spectrum from one random vector, the same at each reading."""
    ritz_weights: tuple[float, ...] = ()
    """Their weights, which sum to 1: shares of all eigenvalues."""
    hessian_trace: float = NAN
    """tr H; loss / parameter^2."""
    hessian_trace_stderr: float = NAN
    """One standard error, over the probes."""
    noise_trace: float = NAN
    """tr S of single examples' gradients; (loss / parameter)^2."""
    noise_scale: float = NAN
    """B_simple, in examples; negative where the mean gradient is below its noise."""
    noise_scale_lower: float = NAN
    """Lower end of its interval, in examples."""
    noise_scale_upper: float = NAN
    """Upper end; may be infinite."""
    evidence: float = NAN
    """Of the stopping criterion of Mahsereci et al.; above 0, training on these data may stop."""
    full_penalty: float = NAN
    """What finite steps add to the loss by the full gradient."""
    batch_penalty: float = NAN
    """What they add by the noise of batches."""
    num_matvecs: int = 0
    """Products with the Hessian that the reading took."""
    num_losses: int = 0
    """Forward passes."""
    seconds: float = NAN
    """Wall clock of the reading."""

    @property
    def stability(self) -> float:
        """(Preconditioned) sharpness over its threshold; above 1 the step is unstable on a quadratic."""
        top = self.sharpness if math.isnan(self.preconditioned) else self.preconditioned
        return top / self.threshold

    def numbers(self) -> dict[str, Any]:
        """Return all fields by name, those of layers as "layers.fc1"."""
        return _flat(self)

    def row(self) -> dict[str, Any]:
        """Return what was measured as JSON holds it, numbers that are not finite as text; what was not is left out."""
        default = TrainingReading(step=-1)
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(x) for name, x in kept.items() if _plain(x) != _plain(getattr(default, name))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> TrainingReading:
        """Return the reading of a row; names that this version does not know are left out."""
        known = {f.name for f in fields(cls)}
        row = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
        return cls(**{name: _number(x) for name, x in row.items() if name in known})


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingRecord(Result):
    """All readings of a run, in the order they were taken."""

    _figure = "plot_training"

    readings: tuple[TrainingReading, ...]
    """One whenever the tracker took one."""
    num_steps: int = 0
    """Steps of the run so far."""
    optimizer: str = ""
    """Class of the optimizer; "" where the tracker was given none."""
    batch_size: int | None = None
    """Of the training, in examples, where it was told."""
    num_params: int | None = None
    """Of the objective; None in records read from rows alone."""
    notes: tuple[str, ...] = ()
    """What a reader should know: how often readings were taken, and why."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that the readings are filed under."""
        return tuple(reading.step for reading in self.readings)

    def series(self, name: str) -> Tensor:
        """Return one field, or `stability`, of all readings, (R,), float64.

        Raises:
            InputError: for a name that is none of a reading's numbers.
        """
        if not self.readings:
            return torch.zeros(0, dtype=torch.float64)
        values = [getattr(reading, name, None) for reading in self.readings]
        if not all(isinstance(value, (int, float)) for value in values):
            raise InputError(f"series takes the name of a number of a reading, such as 'sharpness', got {name!r}.")
        return torch.tensor(values, dtype=torch.float64)

    def to_csv(self, path: Path | str) -> Path:
        """Write a row for each reading and a column for each number, those of layers by name; return the path.

        Raises:
            InputError: if the file cannot be written.
        """
        rows = [reading.numbers() for reading in self.readings]
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror}); choose another place.") from error
        return Path(path)


@dataclass(frozen=True, kw_only=True, repr=False)
class LossSpike(Result):
    """A rise of the loss, and what the readings before it showed."""

    step: int
    """Where it begins."""
    loss: float
    """Loss there."""
    rise: float
    """That over the median of the readings before."""
    level: float
    """Alarm level of the warning signal: the update's norm over its median of the readings before."""
    warned: int | None
    """First of the ten readings before at which the signal was above it; None if at none."""
    lead: int | None
    """Steps from there to the spike."""
    crossed: int | None
    """Where (preconditioned) sharpness came above its threshold, if it was above it in the readings before."""
    layer: str
    """The layer that held most of the sharpest direction there; "" where it was not measured."""
    layer_share: float
    """Its share."""


class Phase(Enum):
    """Where a run stands between its sharpness and the threshold of its learning rate."""

    BELOW = "below the threshold"
    SHARPENING = "below the threshold, and sharpness rises"
    EDGE = "at the threshold"
    CATAPULT = "above the threshold, the loss rises, and both come back"
    ABOVE = "above the threshold for a while, without a rise of the loss"
    UNSTABLE = "above the threshold until the end, or a loss that is not finite"
    UNKNOWN = "the threshold is not known"


@dataclass(frozen=True, kw_only=True, repr=False)
class EdgeOfStability(Result):
    """A run against the threshold of stability of its optimizer."""

    phases: tuple[Phase, ...]
    """Of each reading."""
    arrival: int | None
    """Step at which sharpness first came up to its threshold, or where the run began above it; None if neither."""
    mean: float
    """Mean of sharpness over threshold after the arrival, weighted by steps; NaN without one."""
    std: float
    """Its standard deviation over readings."""
    share_above: float
    """Share of all steps at which sharpness was above the threshold."""
    oscillation: float
    """Median of the readings' oscillation at the edge: about -1 in the regime; NaN where it was not measured."""


def _flat(reading: TrainingReading) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(reading):
        value = getattr(reading, f.name)
        if not isinstance(value, tuple):
            found |= (
                {f"{f.name}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {f.name: value}
            )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _number(x) for name, x in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value
