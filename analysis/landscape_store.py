"""Runs of landscapes, and what an unfinished one leaves behind for the next call to go on with.

While points are computed, a folder `.NAME.partial` beside the run holds the settings, the directions and every point
found; the run folder itself appears when it is complete, and the draft is gone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from analysis.landscape_results import Direction, Landscape
from analysis.point_log import PointLog
from analysis.store import Record, check_destination, free_folder, load_record
from curvature.errors import InputError

__all__ = ["Draft", "LandscapeEstimate", "LandscapeRun", "load_landscape", "place_of_run"]


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
        file = self.path / "settings.json"
        text = json.dumps(settings, sort_keys=True, default=str)
        try:
            if file.is_file():
                before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
                if other := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
                    raise InputError(
                        f"{self.path} was begun with another {', '.join(other)}; repeat the command as it was, or "
                        "begin again with --overwrite."
                    )
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{self.path} cannot be used ({error}); delete it and begin again.") from error
        return PointLog(self.path / "points.jsonl")

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
            draft = self.path / f".{name}.npz"  # whole or not at all
            np.savez(draft, allow_pickle=False, **pack())
            draft.rename(file)
        with np.load(file, allow_pickle=False) as kept:
            return unpack(kept)


def place_of_run(name: str, out: Path | None, *, resume: bool, overwrite: bool) -> tuple[Path, Draft]:
    """Return the folder a landscape is to be written to, and its draft.

    Without `out` it is runs/NAME-landscape-n: with `resume` the first that is unfinished, else the first that is free.

    Raises:
        InputError: if `out` may not be written, or was begun before and is neither to be continued nor given up.
    """
    if out is not None:
        check_destination(out, overwrite=overwrite)
        draft = _draft_of(out)
        if overwrite and not resume:
            draft.remove()
        if draft.exists and not resume:
            raise InputError(
                f"{out} was begun and not finished; go on with --resume, begin again with --overwrite, or choose "
                "another folder with --out."
            )
        return out, draft
    stem = f"{name}-landscape"
    folder = free_folder(Path("runs"), stem)
    base, _, number = folder.name.rpartition("-")
    n = int(number)
    unfinished = sorted(
        (int(path.name.removesuffix(".partial").rpartition("-")[2]), path)
        for path in Path("runs").glob(f".{base}-*.partial")
        if path.name.removesuffix(".partial").rpartition("-")[2].isdigit()
    )
    if resume and unfinished:
        n = unfinished[0][0]
    while not resume and (_draft_of(folder.parent / f"{base}-{n}").exists or (folder.parent / f"{base}-{n}").exists()):
        n += 1
    folder = folder.parent / f"{base}-{n}"
    return folder, _draft_of(folder)


def _draft_of(folder: Path) -> Draft:
    return Draft(folder.parent / f".{folder.name}.partial")
