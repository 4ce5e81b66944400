"""The file of a training run: a row of JSON for each reading, appended as it is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from analysis.run.lines import append_line, read_lines, write_lines
from analysis.run.record import now, versions
from analysis.training.results import TrainingReading, TrainingRecord
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["ROWS", "Rows", "load_training"]

ROWS = "training.jsonl"
"""Name of the file in its folder."""
_FORMAT = 1


class Rows:
    """The rows of one run; of several ranks only the first writes.

    Args:
        folder: where the file lies; it is made with the first row.
        objective: what is trained, for the first line.

    Raises:
        InputError: if the folder is a file.
    """

    def __init__(self, folder: Path | str, objective: Objective) -> None:
        self._path = Path(folder) / ROWS
        if Path(folder).exists() and not Path(folder).is_dir():
            raise InputError(f"folder must be a folder, and {folder} is a file.")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._writes = not distributed or torch.distributed.get_rank() == 0
        self._head = {
            "format": _FORMAT,
            "model": type(objective.model).__name__,
            "num_params": objective.num_params,
            "versions": versions(),
        }
        self._begun = False

    def add(self, reading: TrainingReading, readings: list[TrainingReading]) -> None:
        """Append the newest of all readings.

        Raises:
            InputError: if the file holds the rows of another run, or cannot be written.
        """
        if not self._writes:
            return
        if not self._begun and self._path.exists():
            raise InputError(
                f"{self._path} holds the rows of an earlier run: go on with it by load_state_dict(), or give another "
                "folder."
            )
        if not self._begun:
            self.begin_again(readings)
        else:
            self._tried(lambda: append_line(self._path, json.dumps(reading.row())))

    def begin_again(self, readings: list[TrainingReading]) -> None:
        """Write the file anew, with these rows."""
        if not self._writes:
            return
        lines = [json.dumps(x) for x in ({**self._head, "created": now()}, *(r.row() for r in readings))]

        def write() -> None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(self._path, lines)

        self._tried(write)
        self._begun = True

    def _tried(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise InputError(f"cannot write to {self._path} ({error.strerror}); choose another folder.") from error


def load_training(folder: Path | str) -> TrainingRecord:
    """Read the rows that a `CurvatureTracker` left in a folder, also while it still writes or after it was killed.

    Raises:
        InputError: if there is no such file, or it holds something else.
    """
    path = Path(folder) / ROWS
    try:
        head, *rows = (json.loads(line) for line in read_lines(path, repair=False))
        if head["format"] != _FORMAT:
            raise InputError(f"{path} was written in format {head['format']}, and this version reads {_FORMAT}.")
        readings = tuple(TrainingReading.from_row(row) for row in rows)
        return TrainingRecord(readings=readings, num_steps=readings[-1].step + 1 if readings else 0)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the folder of a tracker.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds lines that are no readings; give the folder of a tracker.") from error
