"""Runs of landscapes, and what an unfinished one leaves behind for the next call to go on with.

While points are computed, a hidden folder in that of the run holds the settings, the directions and every point found;
it is gone when the run is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from analysis.landscape.point_log import PointLog
from analysis.landscape.results import Direction, Landscape
from analysis.records.plain import to_plain
from analysis.run.folder import UNFINISHED
from analysis.run.reservation import Place, check_destination, free_folder, reserve, reserve_free
from analysis.run.saving import write_text
from analysis.run.store import Record, load_record
from curvature.errors import InputError, WriteError

__all__ = ["Draft", "LandscapeEstimate", "LandscapePlace", "LandscapeRun", "load_landscape"]


@dataclass(frozen=True, kw_only=True)
class LandscapeEstimate:
    """What a landscape will cost, before it is paid."""

    num_losses: int
    """Looks at the loss on all data: forward passes."""
    num_gradients: int
    """Gradients on all data."""
    num_matvecs: int
    """Hessian products, about."""
    seconds_per_loss: float
    """Of one that was timed."""
    seconds: float
    """Of all."""


@dataclass(frozen=True, kw_only=True)
class LandscapeRun(Record):
    """One landscape, with what produced it."""

    kind: ClassVar[str] = "landscape"
    result: ClassVar[str] = "landscape"

    estimate: LandscapeEstimate
    """Cost as predicted before the work; `landscape.cost` is what it came to."""
    landscape: Landscape
    """The results."""


def load_landscape(folder: Path | str) -> LandscapeRun:
    """Read the folder of a landscape; the tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete landscape, or one written by a newer version.
    """
    return load_record(folder, LandscapeRun)


class Draft:
    """The folder of an unfinished landscape.

    Args:
        path: of the folder; it is made when there is something to keep.
    """

    _CONFIRMED = frozenset({"loss"})  # by `confirm`

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def begin(self, settings: dict[str, Any]) -> PointLog:
        """Make or open the folder, and return its points.

        Raises:
            InputError: if it was begun with other settings, cannot be read, or cannot be written.
        """
        try:
            if self._settings.is_file():
                self._confirm(settings, whole=True)
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self._settings, _json(settings))
        except OSError as error:
            raise InputError(f"{self.path} cannot be used ({error}); delete it and begin again.") from error
        return PointLog(self.path / "points.jsonl")

    def confirm(self, name: str, value: object) -> None:
        """Keep something else that all points depend on, or compare it with what was kept.

        Raises:
            InputError: if it was another one.
        """
        before = self._confirm({name: value}, whole=False)
        if name not in before:
            with contextlib.suppress(OSError):  # it cannot be compared later; nothing else depends on it
                write_text(self._settings, _json({**before, name: value}))

    @property
    def _settings(self) -> Path:
        return self.path / "settings.json"

    def _confirm(self, settings: dict[str, Any], *, whole: bool) -> dict[str, Any]:
        """Compare settings with those that were kept, and return these."""
        try:
            before, now = json.loads(self._settings.read_text(encoding="utf-8")), json.loads(_json(settings))
            common = now.keys() & before.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{self._settings} cannot be read ({error}); begin again with --overwrite.") from error
        names = (now.keys() | before.keys()) - self._CONFIRMED if whole else common
        if other := sorted(name for name in names if before.get(name) != now.get(name)):
            raise InputError(
                f"{self.path.parent} was begun with another {', '.join(other)}; repeat the command as it was, or "
                "begin again with --overwrite."
            )
        return dict(before)

    def tensor(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that was kept, or compute and keep it."""
        return self._kept(
            name, lambda: {"tensor": compute().cpu().numpy()}, lambda kept: torch.from_numpy(kept["tensor"])
        )

    def directions(self, compute: Callable[[], tuple[Direction, ...]]) -> tuple[Direction, ...]:
        """Return the directions that were kept, or compute and keep them: another solve may end at other bits."""

        def pack() -> dict[str, Any]:
            found = compute()
            about = [[d.name, d.kind, d.scaling, d.norm] for d in found]
            return {
                "about": np.array(json.dumps(about)),
                **{str(i): d.vector.cpu().numpy() for i, d in enumerate(found)},
            }

        def unpack(kept: Any) -> tuple[Direction, ...]:
            about = json.loads(str(kept["about"]))
            return tuple(
                Direction(name=name, kind=kind, scaling=scaling, norm=norm, vector=torch.from_numpy(kept[str(i)]))
                for i, (name, kind, scaling, norm) in enumerate(about)
            )

        return self._kept("directions", pack, unpack)

    def remove_if_empty(self) -> None:
        """Delete the folder if it holds no point that was found."""
        if not (self.path / "points.jsonl").is_file():
            self.remove()

    def remove(self) -> None:
        """Delete the folder, if there is one."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _kept(self, name: str, pack: Callable[[], dict[str, Any]], unpack: Callable[[Any], Any]) -> Any:
        file = self.path / f"{name}.npz"
        if not file.is_file():
            packed = pack()
            draft = self.path / f".{name}.npz"  # whole or not at all
            try:
                np.savez(draft, allow_pickle=False, **packed)
                draft.rename(file)
            except OSError:  # what was computed is used all the same; it cannot be continued from
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)
            return unpack(packed)
        try:
            with np.load(file, allow_pickle=False) as kept:
                return unpack(kept)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} cannot be read ({error}); begin again with --overwrite.") from error


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(to_plain(settings, number=str), sort_keys=True)


class LandscapePlace:
    """Where a landscape is written, and what is kept of it until then; as a context, it is given up at the end.

    Without `out` it is runs/NAME-landscape-n: with `resume` the first that is unfinished, else the first that is free.

    Args:
        out: the folder asked for.
        resume: go on with what was begun there.
        overwrite: give up a run that is there, and what was begun.

    Raises:
        InputError: if `out` may not be written, or was begun before and is neither to be continued nor given up.
    """

    def __init__(self, out: Path | None, *, resume: bool, overwrite: bool) -> None:
        self._resume = resume
        self._place = None if out is None else reserve(out, overwrite=overwrite, resume=resume)
        if out is None:
            check_destination(free_folder(Path("runs"), "run"))

    @property
    def reserved(self) -> Place:
        """The place, once the draft was asked for."""
        assert self._place is not None
        return self._place

    def draft(self, name: str) -> Draft:
        """Return the draft, in a folder by the name of the task unless one was asked for."""
        stem = f"{name}-landscape"
        if self._place is None and self._resume:
            self._place = _unfinished(stem)
        if self._place is None:
            self._place = reserve_free(Path("runs"), stem)
        return Draft(self._place.folder / UNFINISHED)

    def __enter__(self) -> LandscapePlace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._place is None:
            return
        draft = Draft(self._place.folder / UNFINISHED)
        if error is None or isinstance(error, WriteError) or (isinstance(error, KeyboardInterrupt) and error.args):
            draft.remove()  # the numbers are written
        draft.remove_if_empty()
        self._place.release()
        if isinstance(error, KeyboardInterrupt) and draft.exists:
            again = f"what was found is kept: go on with --resume --out {self._place.shown}"
            raise type(error)(again) from error


def _unfinished(stem: str) -> Place | None:
    """Reserve the first folder of that name that was begun, not finished, and is not being written now."""
    base, _, _ = free_folder(Path("runs"), stem).name.rpartition("-")
    numbers = [path.parent.name.removeprefix(f"{base}-") for path in Path("runs").glob(f"*/{UNFINISHED}")]
    for number in sorted(int(n) for n in numbers if n.isdigit()):
        with contextlib.suppress(InputError):
            return reserve(Path("runs") / f"{base}-{number}", resume=True)
    return None
