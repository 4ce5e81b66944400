"""Runs onto the disk: numbers first, then the report; and elsewhere, where the disk does not take them."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from analysis.run.folder import ARRAYS, CONFIG, FORMAT, RESULTS
from analysis.run.record import Record
from analysis.run.reservation import Place, reserve
from analysis.run.seal import sealed
from analysis.run.signals import uninterrupted
from curvature.errors import WriteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_report", "save_run", "write_figure", "write_text"]


def save_run(
    run: Record,
    folder: Path | Place,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """Write a run folder, whole or not at all, and return its path.

    The numbers come first. A report that fails or is interrupted leaves a folder without a report. Where the folder
    cannot be written, the run goes to a new one in the directory for temporary files.

    Args:
        run: what to write.
        folder: where, as `analysis.run.reservation.reserve` takes it, or what that returned before the measurement.
        overwrite: replace a run that is there; it is kept until the new one is complete, files beside it for good.
        finish: called with a folder that holds the numbers, to add files to it (the report).

    Raises:
        InputError: if the folder holds something that may not be replaced, or was not writable to begin with.
        WriteError: if something could not be written; `folder` says where the numbers are.
    """
    if not isinstance(folder, Place):
        with reserve(folder, overwrite=overwrite) as place:
            return save_run(run, place, finish=finish)
    place = folder
    broken: Exception | KeyboardInterrupt | None = None
    try:
        with uninterrupted() as stop:
            draft = _drafted(run, place)
        broken = KeyboardInterrupt() if stop.asked else _finished(draft, finish)
        with uninterrupted() as stop:
            _list_files(draft)
            place.put()
    except OSError as error:
        raise _rescued(run, place, finish, error) from error
    if stop.asked:
        raise KeyboardInterrupt(f"the numbers are in {place.shown}.")
    shown = place.shown
    if isinstance(broken, KeyboardInterrupt):
        raise type(broken)(f"the numbers are in {shown}; `curvature report {shown}` writes the report.") from broken
    if broken is not None:
        raise WriteError(
            f"the numbers are in {shown}, but not the report: {_reason(broken)}; write it with `curvature report "
            f"{shown}`.",
            shown,
        ) from broken
    return shown.absolute()


def add_report(folder: Path, finish: Callable[[Path], object]) -> None:
    """Write the report of a run that is there, in place of an earlier one.

    Args:
        folder: of a complete run.
        finish: what writes it, as for `save_run`.

    Raises:
        InputError: if the folder cannot be written to.
        WriteError: if the report cannot be made; the run is as it was.
    """
    with reserve(folder, overwrite=True, resume=True) as place:
        try:
            draft = place.begin()
            for name in (RESULTS, ARRAYS, CONFIG):
                shutil.copyfile(place.folder / name, draft / name)
            finish(draft)
            _list_files(draft)
            place.put()
        except Exception as error:
            raise WriteError(f"the report of {folder} cannot be written: {_reason(error)}.", folder) from error
        finally:
            place.drop()


def _drafted(run: Record, place: Place) -> Path:
    """Write the numbers of a run into the draft of its place."""
    try:
        draft = place.begin()
        _write(run, draft)
    except BaseException:
        place.drop()
        raise
    return draft


def _write(run: Record, folder: Path) -> None:
    config = {"format": FORMAT, "kind": run.kind, **run.stored()}
    results = config.pop(run.result)
    _write_json(folder / RESULTS, results)
    arrays: dict[str, np.ndarray] = {}
    _collect_arrays(getattr(run, run.result), "", arrays)
    np.savez_compressed(folder / ARRAYS, allow_pickle=False, **arrays)
    _flush(folder / ARRAYS)
    _write_json(folder / CONFIG, {**config, "files": [RESULTS, ARRAYS, CONFIG]})


def _finished(folder: Path, finish: Callable[[Path], object] | None) -> Exception | KeyboardInterrupt | None:
    """Let `finish` add its files, and return what went wrong; half-written files are gone then."""
    if finish is None:
        return None
    try:
        finish(folder)
    except (Exception, KeyboardInterrupt) as error:
        return error
    finally:
        for file in folder.glob(".*"):
            file.unlink()
    return None


def _list_files(draft: Path) -> None:
    """Write into the configuration which files belong to the run."""
    config = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
    config["files"] = sorted(file.name for file in draft.iterdir() if not file.name.startswith("."))
    _write_json(draft / CONFIG, sealed(config, draft))


def _rescued(run: Record, place: Place, finish: Callable[[Path], object] | None, error: OSError) -> WriteError:
    """Write a run whose folder failed to the first other place that takes it, and return the error that tells."""
    what = f"{place.shown} could not be written ({_reason(error)})"
    partly = None
    for parent in (tempfile.gettempdir, Path.cwd, Path.home):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"curvature-{run.kind}-", dir=parent()))
        except (OSError, RuntimeError):  # there is no such place
            continue
        try:
            _write(run, folder)
            broken = _finished(folder, finish)
            _list_files(folder)
        except OSError:
            if (folder / RESULTS).is_file() and partly is None:
                partly = folder
            else:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        if partly is not None:
            shutil.rmtree(partly, ignore_errors=True)
        place.drop()
        report = "" if broken is None else f", without its report ({_reason(broken)})"
        return WriteError(f"{what}; the run is in {folder}{report}.", folder)
    if partly is not None:
        return WriteError(f"{what}, and no other place took all of it; its numbers are in {partly / RESULTS}.", partly)
    return WriteError(f"{what}, nor any other place; the numbers are lost but for what is printed here.", None)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _write_json(path: Path, content: object) -> None:
    """Write a file of JSON that appears when it is complete and on the disk."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no characters, in the name of a file
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8, that appears when it is complete and on the disk."""
    _write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PDF, a file that appears when it is complete and on the disk."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    _write_bytes(path, buffer.getvalue())


def _write_bytes(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}")
    new.write_bytes(data)
    _flush(new)
    new.replace(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _collect_arrays(record: Any, path: str, arrays: dict[str, np.ndarray]) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            arrays[f"{path}{field.name}"] = value.detach().cpu().numpy()
        elif is_dataclass(value):
            _collect_arrays(value, f"{path}{field.name}.", arrays)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if is_dataclass(item):
                    _collect_arrays(item, f"{path}{field.name}.{i}.", arrays)
