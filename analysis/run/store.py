"""Run folders: what a measurement found, and all that it takes to understand and repeat it.

    config.json    task, settings, seed, command line, checkpoint, versions, self-check, estimated cost
    results.json   every number but the large arrays, for people and programs
    arrays.npz     every tensor, by the name of its field: eigenvectors, density, quadrature nodes, ...
    report.html    written by whoever has a report to add

A folder holds a run only when it is complete: config.json comes last, see `analysis.run.folder`. Numbers that are not
finite are the strings "inf", "-inf" and "nan" there, since JSON has no others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import platform
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from analysis.records.plain import to_plain
from analysis.run.folder import ARRAYS, CONFIG, FORMAT, RESULTS, locate
from analysis.run.saving import save_run, stored
from analysis.run.seal import broken_seal
from analysis.show.report import Report
from curvature.errors import InputError

__all__ = ["Record", "kind_of", "load_record", "now", "save_run", "versions"]

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

    def report(self) -> Report:
        """Return what there is to tell of it: what the terminal and the page show."""
        raise NotImplementedError

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder that the command writes: numbers, arrays, the page and its figures; and return its path.

        Args:
            folder: where; it must not exist, be empty, or hold a run that `overwrite` gives up.
            overwrite: replace a run that is there.

        Raises:
            InputError: if the folder holds something that may not be replaced, or cannot be written to.
            WriteError: if something could not be written; its `folder` says where the numbers are.
        """
        from analysis.run.report import write_report

        return save_run(self, Path(folder), overwrite=overwrite, finish=lambda draft: write_report(self, draft))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the large arrays as plain Python values that JSON can hold."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self)}

    def to_json(self) -> str:
        """Return `to_dict` in one line of JSON, with numbers that are not finite as the run folder has them."""
        return json.dumps(stored(self), allow_nan=False)


# -- what a record states ---------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions that results depend on, and the platform without anything that names the machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout that was not installed
        found["torch-curvature"] = importlib.metadata.version("torch-curvature")
    found["platform"] = f"{platform.system()} {platform.machine()}".strip()
    found["threads"] = str(torch.get_num_threads())
    return found


def now() -> str:
    """Return the time, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# -- reading ----------------------------------------------------------------------------------------------------------


def kind_of(folder: Path | str) -> str:
    """Return what was measured in the run that a folder holds: the `kind` of its record.

    Raises:
        InputError: if the folder holds no complete run.
    """
    folder = Path(folder)
    with _damage_told(folder):
        if not all(locate(folder, name).is_file() for name in (CONFIG, RESULTS)):
            raise InputError(f"{folder} holds no complete run; give a folder that the command `curvature` wrote.")
        return str(json.loads(locate(folder, CONFIG).read_text(encoding="utf-8"))["kind"])


@contextlib.contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """Say in a sentence what damaged files lead to, which is any exception."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"the run in {folder} is damaged ({type(error).__name__}: {said}); repeat it.") from error


def load_record(folder: Path | str, cls: type[R]) -> R:
    """Read a run folder of any kind, bit for bit, with tensors on the CPU.

    Args:
        folder: what `save_run` wrote.
        cls: the kind of record it holds.

    Raises:
        InputError: if the folder holds no complete run of that kind, or one written by a newer version.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    run = None
    with _damage_told(folder):
        config = json.loads(locate(folder, CONFIG).read_text(encoding="utf-8"))
        written = int(config["format"])
        if written == FORMAT and kind == cls.kind:
            if changed := broken_seal(config, lambda name: locate(folder, name)):
                raise InputError(f"the run in {folder} is damaged: {changed} is not as it was written; repeat it.")
            results = json.loads(locate(folder, RESULTS).read_text(encoding="utf-8"))
            content = io.BytesIO(locate(folder, ARRAYS).read_bytes())
            with np.load(content, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            run = _rebuild(cls, {**config, cls.result: results}, arrays, "")
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
        values[field.name] = array if array is not None else _restore(kind, data[field.name], arrays, below)
    return cls(**values)


def _restore(kind: Any, value: Any, arrays: Mapping[str, Tensor], path: str) -> Any:
    if is_dataclass(kind):
        return _rebuild(kind, value, arrays, path)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        return tuple(_restore(get_args(kind)[0], item, arrays, f"{path}{i}.") for i, item in enumerate(value))
    if get_origin(kind) is dict:
        return {key: _restore(get_args(kind)[1], item, arrays, "") for key, item in value.items()}
    if get_origin(kind) is types.UnionType:
        return None if value is None else _restore(get_args(kind)[0], value, arrays, path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[value]
    if kind is float:
        return float("nan") if value is None else float(value)
    return _decoded(value)


def _decoded(value: Any) -> Any:
    """Return a free value of a record with the numbers that are not finite as numbers again."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"number"} and value["number"] in ("inf", "-inf", "nan"):
            return float(value["number"])
        return {key: _decoded(item) for key, item in value.items()}
    return value
