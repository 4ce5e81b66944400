"""The files of a run in its folder: which are ours, where they lie, and how a new run takes the place of an old one.

A run is written into the hidden folder DRAFT of its place and moved out file by file, config.json last: without it
there is no run. A run that is replaced steps aside into EARLIER, config.json first, and is read from there until the
new one is complete. What a process leaves that is killed at any point can be read (`locate`), and `recover` completes
it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

__all__ = [
    "ARRAYS",
    "CONFIG",
    "DRAFT",
    "FORMAT",
    "HIDDEN",
    "LOCK",
    "REPORT",
    "RESULTS",
    "UNFINISHED",
    "is_run",
    "locate",
    "own_files",
    "put_in_place",
    "recover",
]

FORMAT = 3
"""Of the files below; a reader of one format reads no other."""
CONFIG, RESULTS, ARRAYS, REPORT = "config.json", "results.json", "arrays.npz", "report.html"
DRAFT, EARLIER = ".curvature-draft", ".curvature-earlier"
LOCK, UNFINISHED = ".curvature-lock", ".curvature-unfinished"
HIDDEN = (DRAFT, EARLIER, LOCK, UNFINISHED)


def locate(folder: Path, name: str) -> Path:
    """Return where a file of the run in a folder lies, even if a process was killed while it replaced that run."""
    if (folder / CONFIG).is_file():
        return folder / name
    aside = folder / EARLIER
    if (aside / CONFIG).is_file():  # its other files step aside after it
        return aside / name if (aside / name).is_file() else folder / name
    draft = folder / DRAFT
    return draft / name if (draft / CONFIG).is_file() and not (folder / name).is_file() else folder / name


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run that this toolkit wrote."""
    return _config(locate(folder, CONFIG)) is not None and locate(folder, RESULTS).is_file()


def own_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that belong to the run in a folder."""
    config = _config(locate(folder, CONFIG)) or {}
    listed = config.get("files")
    names = listed if isinstance(listed, list) else []
    plain = [n for n in names if isinstance(n, str) and n not in ("", ".", "..", CONFIG, *HIDDEN) and Path(n).name == n]
    return tuple(dict.fromkeys([RESULTS, ARRAYS, *plain, CONFIG]))


def _config(file: Path) -> dict[str, Any] | None:
    """Return what config.json holds, if it is one of ours."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = (
        isinstance(config, dict) and isinstance(config.get("format"), int) and isinstance(config.get("versions"), dict)
    )
    return config if ours and {"task", "settings", "seed", "command"} <= config.keys() else None


# -- replacing --------------------------------------------------------------------------------------------------------


def put_in_place(path: Path) -> None:
    """Move the files of the draft to their places; those of an earlier run step aside first. See the module."""
    draft, aside = path / DRAFT, path / EARLIER
    new = _listed(draft / CONFIG)
    begun = any(not os.path.lexists(draft / name) for name in new)  # by a process that was killed
    if (path / CONFIG).is_file():
        shutil.rmtree(aside, ignore_errors=True)
    old = _listed(aside / CONFIG if (aside / CONFIG).is_file() else path / CONFIG)
    if not begun:
        for name in new:
            if os.path.lexists(path / name) and (name not in old or (path / name).is_dir()):
                raise FileExistsError(errno.EEXIST, f"the folder holds a file {name} that the run there did not write")
    moves = list[tuple[Path, Path]]()
    if old and not begun:
        aside.mkdir(exist_ok=True)
        moves += [(path / name, aside / name) for name in (CONFIG, *old) if os.path.lexists(path / name)]
    moves += [(draft / name, path / name) for name in new if os.path.lexists(draft / name)]
    done = list[tuple[Path, Path]]()
    try:
        for source, target in dict(moves).items():
            done.append((source, target))
            source.rename(target)
    except BaseException:
        for source, target in reversed(done):
            with contextlib.suppress(OSError):
                if os.path.lexists(target) and not os.path.lexists(source):
                    target.rename(source)
        with contextlib.suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(draft, ignore_errors=True)


def _listed(config: Path) -> tuple[str, ...]:
    """Return the files that a config.json lists, itself last; none if it is not there."""
    return own_files(config.parent) if config.is_file() else ()


def recover(path: Path) -> None:
    """Complete what a process left that was killed: a draft that is whole takes its place, another one goes."""
    draft, aside = path / DRAFT, path / EARLIER
    if _config(draft / CONFIG) is not None:
        put_in_place(path)
    shutil.rmtree(draft, ignore_errors=True)
    if (path / CONFIG).is_file() or not (aside / CONFIG).is_file():
        shutil.rmtree(aside, ignore_errors=True)
        return
    for name in _listed(aside / CONFIG):
        if os.path.lexists(aside / name):
            (aside / name).rename(path / name)
    shutil.rmtree(aside, ignore_errors=True)
