"""What an unfinished measurement leaves behind for the next call to go on with.

While it works, a hidden folder in that of the run holds what it depends on and all that was found; it is gone when the
run is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.run.identity import batches_sha256, loss_sha256
from analysis.run.preparation import Request, data_sha256, fingerprint
from analysis.run.saving import write_text
from analysis.tasks import Task
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.results.record import to_plain

__all__ = ["POINTS", "STATE", "Draft"]

POINTS, STATE = "points.jsonl", "state.pt"
"""Where what was found is noted, or the state of a training kept; a folder without either is worth nothing."""

_BEGUN, _CONFIRMED = "begun with", "confirmed"
_VALUE = "value of the loss"


class Draft:
    """The folder of an unfinished measurement.

    Args:
        path: of the folder; it is made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def begin(self, task: Task, objective: Objective, request: Request, settings: dict[str, Any]) -> None:
        """Make the folder, or open it and compare what it was begun with.

        Raises:
            InputError: if it was begun with other settings, cannot be read, or cannot be written.
        """
        weights = fingerprint(*(t for t in task.model.state_dict().values() if isinstance(t, Tensor)))
        about = {
            "task": request.task,
            "seed": request.seed,
            "checkpoint": str(request.checkpoint),
            **{f"setting {name}": value for name, value in settings.items()},
            "device": objective.device.type,  # others round otherwise, and the record names one
            "weights": weights,
            "data": data_sha256(objective.settings["data"]),
            "test data": batches_sha256(task.test_data),
            "loss of the task": loss_sha256(objective.settings["loss"]),
            _VALUE: float(objective.loss()),
        }
        try:
            if self._settings.is_file():
                self._compare(_read(about), self._kept(_BEGUN), whole=True)
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self._settings, _json({_BEGUN: about, _CONFIRMED: {}}))
        except OSError as error:
            raise InputError(f"{self.path} cannot be used ({error}); delete it and begin again.") from error

    def confirm(self, name: str, value: object) -> None:
        """Keep something else that all points depend on, or compare it with what was kept.

        Raises:
            InputError: if it was another one.
        """
        before = self._kept(_CONFIRMED)
        self._compare(_read({name: value}), before, whole=False)
        if name not in before:
            both = {_BEGUN: self._kept(_BEGUN), _CONFIRMED: {**before, name: value}}
            with contextlib.suppress(OSError):  # it cannot be compared later; nothing else depends on it
                write_text(self._settings, _json(both))

    @property
    def _settings(self) -> Path:
        return self.path / "settings.json"

    def _kept(self, part: str) -> dict[str, Any]:
        """Return what was written when it was begun, or confirmed since."""
        try:
            return dict(json.loads(self._settings.read_text(encoding="utf-8"))[part])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self._settings} cannot be read ({error}); begin again with --overwrite.") from error

    def _compare(self, now: dict[str, Any], before: dict[str, Any], *, whole: bool) -> None:
        names = now.keys() | before.keys() if whole else now.keys() & before.keys()
        other = sorted(name for name in names if not _alike(name, before.get(name), now.get(name)))
        if other:
            causes = [name for name in other if name != _VALUE] or other  # the value follows from them
            told = ", ".join(name.removeprefix("setting ") for name in causes)
            raise InputError(
                f"{self.path.parent} was begun with another {told}; repeat the command as it was, or begin again with "
                "--overwrite."
            )

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors that were kept, or compute and keep them: another solve may end at other bits."""
        file, half = self.path / f"{name}.npz", self.path / f".{name}.npz"  # whole or not at all
        if not file.is_file():
            found = {key: tensor.cpu() for key, tensor in compute().items()}
            try:
                np.savez(half, allow_pickle=False, **{key: tensor.numpy() for key, tensor in found.items()})
                half.rename(file)
            except OSError:  # what was computed is used all the same; it cannot be continued from
                with contextlib.suppress(OSError):
                    half.unlink(missing_ok=True)
            return found
        try:
            with np.load(file, allow_pickle=False) as kept:
                return {key: torch.from_numpy(kept[key]) for key in kept.files}
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} cannot be read ({error}); begin again with --overwrite.") from error

    def remove_if_empty(self) -> None:
        """Delete the folder if it holds nothing to go on from."""
        if not any((self.path / name).is_file() for name in (POINTS, STATE)):
            self.remove()

    def remove(self) -> None:
        """Delete the folder, if there is one."""
        shutil.rmtree(self.path, ignore_errors=True)


def _alike(name: str, before: Any, now: Any) -> bool:
    """Return whether two settings are the same; the loss is summed in another order where a loader shuffles."""
    if name == _VALUE and before != now and before is not None:
        return math.isclose(float(before), float(now), rel_tol=1e-4, abs_tol=1e-9)
    return bool(before == now)


def _read(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they are when they are read again."""
    return dict(json.loads(_json(settings)))


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(to_plain(settings, number=str), sort_keys=True)
