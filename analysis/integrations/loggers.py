"""Where readings go as they are taken: TensorBoard, Weights & Biases, a CSV file. Each is a tracker's `callback`."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis.training.results import TrainingReading
from curvature.errors import InputError

__all__ = ["csv_logger", "scalars", "tensorboard_logger", "wandb_logger"]

_PREFIX = "curvature/"


def scalars(reading: TrainingReading) -> dict[str, float]:
    """Return the finite numbers of a reading but its step, by name: "curvature/sharpness", "curvature/layers/fc1"."""
    found = reading.numbers()
    return {
        _PREFIX + name.replace(".", "/", 1): float(value)
        for name, value in found.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def tensorboard_logger(writer: Any) -> Callable[[TrainingReading], None]:
    """Return a callback that writes each reading to TensorBoard.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`.

    Raises:
        InputError: for something else.

    Example:
        >>> from analysis.training.results import TrainingReading
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> tensorboard_logger(Writer())(TrainingReading(step=7, interval=7, num_matvecs=3, sharpness=2.5))
        curvature/interval 7.0 7
        curvature/sharpness 2.5 7
        curvature/num_matvecs 3.0 7
        curvature/num_losses 0.0 7
    """
    if not hasattr(writer, "add_scalar"):
        raise InputError(f"writer must have add_scalar, as SummaryWriter has, got {type(writer).__name__}.")

    def log(reading: TrainingReading) -> None:
        for name, value in scalars(reading).items():
            writer.add_scalar(name, value, reading.step)

    return log


def wandb_logger(run: Any) -> Callable[[TrainingReading], None]:
    """Return a callback that logs each reading to a run of Weights & Biases, against its own steps.

    Args:
        run: what `wandb.init` returned, online or offline.

    Raises:
        InputError: for something else.
    """
    if not hasattr(run, "define_metric") or not hasattr(run, "log"):
        raise InputError(f"run must be what wandb.init returned, got {type(run).__name__}.")
    run.define_metric(f"{_PREFIX}*", step_metric=f"{_PREFIX}step")  # wandb's own steps count calls and must not go back

    def log(reading: TrainingReading) -> None:
        run.log({**scalars(reading), f"{_PREFIX}step": reading.step})

    return log


def csv_logger(path: Path | str) -> Callable[[TrainingReading], None]:
    """Return a callback that appends each reading to a CSV file, a column for each number of the first one.

    Raises:
        InputError: if the file exists, or, at a reading, cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists; choose another file, or remove it.")
    columns: list[str] = []

    def log(reading: TrainingReading) -> None:
        row = reading.numbers()
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns or list(row), extrasaction="ignore")
                if not columns:
                    columns.extend(row)
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror}); choose another place.") from error

    return log
