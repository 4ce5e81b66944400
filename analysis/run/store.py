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
import io
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from analysis.run.folder import ARRAYS, CONFIG, FORMAT, RESULTS, locate
from analysis.run.record import Record
from analysis.run.seal import broken_seal
from curvature.errors import InputError

__all__ = ["kind_of", "load_record"]

T = TypeVar("T")
R = TypeVar("R", bound="Record")


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
    for field in fields(cls):  # type: ignore[arg-type]  # records and what they hold are dataclasses
        kind = hints[field.name]
        below = "" if field.name == getattr(cls, "result", None) else f"{path}{field.name}."
        array = arrays.get(f"{path}{field.name}")
        if array is None and kind is Tensor:
            raise KeyError(f"{path}{field.name}")
        if array is None and field.name not in data:  # the seal holds, so nothing was lost
            raise InputError(f"the run is of a version whose records have no {field.name!r}; read it with that.")
        values[field.name] = array if array is not None else _restore(kind, data[field.name], arrays, below)
    return cls(**values)


def _restore(kind: Any, value: Any, arrays: Mapping[str, Tensor], path: str) -> Any:
    if is_dataclass(kind):
        return _rebuild(kind, value, arrays, path)  # type: ignore[arg-type]  # is_dataclass says so
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
