"""Run folders: what a measurement found, and all that it takes to understand and repeat it.

    config.json    task, settings, seed, command line, checkpoint, versions, self-check, estimated cost
    results.json   every number but the large arrays, for people and programs
    arrays.npz     every tensor, by the name of its field: eigenvectors, density, quadrature nodes, ...; and infinities
    report.html    written by whoever has a report to add

A folder appears under its name only when it is complete: it is written beside it and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import tempfile
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from analysis.results import CostEstimate, Inspection, to_plain
from curvature.errors import InputError

__all__ = [
    "Record",
    "Run",
    "check_destination",
    "file_sha256",
    "free_folder",
    "kind_of",
    "load_record",
    "load_run",
    "now",
    "save_run",
    "versions",
]

FORMAT = 3
T = TypeVar("T")
R = TypeVar("R", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What produced a result, whatever was measured; a subclass adds the result."""

    kind: ClassVar[str]
    """What was measured, in a word."""
    result: ClassVar[str]
    """Name of the field that holds the result."""

    task: str
    """Reference that leads to the task: a bundled name, "file.py:function" or "package.module:function"."""
    name: str
    """Short name of the task."""
    description: str
    """What the task is, in a sentence or two."""
    metadata: dict[str, Any]
    """What the task says about itself: data, split, accuracy, fingerprints."""
    settings: dict[str, Any]
    """The settings of the measurement: parameters chosen, numbers of things, tolerances."""
    seed: int
    """Seed of the generator that all random probes come from."""
    command: str
    """The command line, as it can be typed again."""
    created: str
    """When the run ended, ISO 8601 in UTC."""
    versions: dict[str, str]
    """Python, libraries and platform."""
    checkpoint: dict[str, str] | None
    """File name and SHA-256 of the checkpoint that was loaded, if any."""
    data_sha256: str | None
    """Digest of the training data, if they are tensors in memory."""
    check: tuple[str, ...] | None
    """What the self-check of the objective found; None if it was switched off."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the large arrays as plain Python values that JSON can hold."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """One inspection, with what produced it."""

    kind: ClassVar[str] = "inspection"
    result: ClassVar[str] = "inspection"

    estimate: CostEstimate
    """Cost as predicted before the work; `inspection.cost` is what it came to."""
    inspection: Inspection
    """The results."""


# -- writing ----------------------------------------------------------------------------------------------------------


def save_run(
    run: Record, folder: Path, *, overwrite: bool = False, finish: Callable[[Path], object] | None = None
) -> Path:
    """Write a run folder, whole or not at all, and return its path.

    Args:
        run: what to write.
        folder: where; parents are made. It must not exist, or be empty, or hold a run that `overwrite` gives up.
        overwrite: replace a run that is there; it is kept until the new one is complete.
        finish: called with the folder while it still has its temporary name, to add files (the report).

    Raises:
        InputError: if the folder cannot be written, or holds something that may not be replaced.
    """
    check_destination(folder, overwrite=overwrite)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"cannot write to {folder.parent}: {error.strerror}; choose another place with --out."
        ) from error
    try:
        _write(run, draft)
        if finish is not None:
            finish(draft)
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        _put_in_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_destination(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a place where a run may not be written, before any work is done.

    Raises:
        InputError: if it is a file, holds a run and `overwrite` is not set, holds anything else, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and a run is a folder; choose another place with --out.")
    if folder.is_dir() and any(folder.iterdir()):
        if not _is_run(folder):
            raise InputError(
                f"{folder} holds files that are no run; they are left alone. Choose an empty or new folder with --out."
            )
        if not overwrite:
            raise InputError(
                f"{folder} holds an earlier run; choose another folder with --out, or replace it with --overwrite."
            )
    ancestor = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK | os.X_OK)):
        raise InputError(f"cannot write to {ancestor}; choose another place with --out.")


def free_folder(parent: Path, name: str) -> Path:
    """Return parent/name-n with the smallest n >= 1 that is not taken."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def versions() -> dict[str, str]:
    """Return the versions that results depend on, and the platform without anything that names the machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout that was not installed
        found["torch-curvature"] = importlib.metadata.version("torch-curvature")
    found["platform"] = f"{platform.system()} {platform.machine()}".strip()
    found["threads"] = str(torch.get_num_threads())
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def now() -> str:
    """Return the time, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(run: Record, folder: Path) -> None:
    config = {"format": FORMAT, "kind": run.kind, **run.to_dict()}
    results = config.pop(run.result)
    arrays: dict[str, np.ndarray] = {}
    _collect_arrays(getattr(run, run.result), "", arrays)
    np.savez_compressed(folder / "arrays.npz", allow_pickle=False, **arrays)
    for name, content in (("config.json", config), ("results.json", results)):
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _collect_arrays(record: Any, path: str, arrays: dict[str, np.ndarray]) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            arrays[f"{path}{field.name}"] = value.detach().cpu().numpy()
        elif isinstance(value, float) and math.isinf(value):  # which JSON cannot hold
            arrays[f"{path}{field.name}"] = np.array(value)
        elif is_dataclass(value):
            _collect_arrays(value, f"{path}{field.name}.", arrays)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if is_dataclass(item):
                    _collect_arrays(item, f"{path}{field.name}.{i}.", arrays)


def _put_in_place(draft: Path, folder: Path) -> None:
    """Rename the finished draft; an earlier run steps aside first and comes back if that fails."""
    if not folder.exists():
        draft.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "earlier"
    folder.rename(aside)
    try:
        draft.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "results.json").is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- reading ----------------------------------------------------------------------------------------------------------


def load_run(folder: Path | str) -> Run:
    """Read the folder of an inspection; the tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete inspection, or one written by a newer version.
    """
    return load_record(folder, Run)


def kind_of(folder: Path | str) -> str:
    """Return what was measured in the run that a folder holds: the `kind` of its record.

    Raises:
        InputError: if the folder holds no complete run.
    """
    folder = Path(folder)
    if not _is_run(folder):
        raise InputError(f"{folder} holds no complete run; give a folder that the command `curvature` wrote.")
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("kind", "inspection"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"the run in {folder} is damaged ({type(error).__name__}: {error}); repeat it.") from error


def load_record(folder: Path | str, cls: type[R]) -> R:
    """Read a run folder of any kind, as `load_run` does.

    Args:
        folder: what `save_run` wrote.
        cls: the kind of record it holds.

    Raises:
        InputError: if the folder holds no complete run of that kind, or one written by a newer version.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with np.load(folder / "arrays.npz", allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        written = int(config["format"])
        fits = written == FORMAT and kind == cls.kind
        run = _rebuild(cls, {**config, cls.result: results}, arrays, "") if fits else None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"the run in {folder} is damaged ({type(error).__name__}: {error}); repeat it.") from error
    if run is None and kind != cls.kind:
        raise InputError(f"{folder} holds the run of another kind ({kind}), not one of {cls.kind}; give one of those.")
    if run is None:
        raise InputError(
            f"{folder} was written in format {written}, and this version reads format {FORMAT}; use that one."
        )
    return run


def _rebuild(cls: type[T], data: Mapping[str, Any], arrays: Mapping[str, Tensor], path: str) -> T:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        kind = hints[field.name]
        below = "" if field.name == getattr(cls, "result", None) else f"{path}{field.name}."
        array = arrays.get(f"{path}{field.name}")
        if array is None and kind is Tensor:
            raise KeyError(f"{path}{field.name}")
        if array is not None and kind in (float, float | None):
            values[field.name] = array.item()
            continue
        values[field.name] = array if array is not None else _restore(kind, data[field.name], arrays, below)
    return cls(**values)


def _restore(kind: Any, value: Any, arrays: Mapping[str, Tensor], path: str) -> Any:
    if is_dataclass(kind):
        return _rebuild(kind, value, arrays, path)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        return tuple(_restore(get_args(kind)[0], item, arrays, f"{path}{i}.") for i, item in enumerate(value))
    if get_origin(kind) is types.UnionType:
        return None if value is None else _restore(get_args(kind)[0], value, arrays, path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[value]
    if kind is float:
        return float("nan") if value is None else float(value)
    return value
