"""Every kind of run there is, by name: what measures it, what reads it, and what writes its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.compare.study import ComparisonRun, account_of_comparison
from analysis.conditioning.study import CONDITIONING
from analysis.critical.study import CRITICAL
from analysis.implicit.study import IMPLICIT
from analysis.inspection.plan import InspectionPlan
from analysis.inspection.record import Run
from analysis.inspection.report import write_report
from analysis.inspection.study import run_inspection
from analysis.landscape.report import write_landscape_report
from analysis.landscape.store import LandscapeRun
from analysis.noise.study import NOISE, NoisePlan
from analysis.run.preparation import Request
from analysis.run.report import report_writer
from analysis.run.reservation import Place, reserve_free
from analysis.run.store import Record, kind_of, load_record, save_run
from analysis.run.study import Study, run_study
from analysis.sharpness.study import SHARPNESS, SharpnessPlan
from analysis.show.listener import Listener
from curvature.errors import InputError

__all__ = ["KINDS", "MEASUREMENTS", "STUDIES", "Kind", "load_any", "measure_checkpoints", "read_runs"]

STUDIES: dict[str, Study[Any, Any]] = {
    study.record.kind: study for study in (SHARPNESS, CONDITIONING, CRITICAL, NOISE, IMPLICIT)
}
"""By kind, which is also the name of the command."""

MEASUREMENTS = ("inspection", "sharpness", "noise")
"""Kinds of runs that checkpoints can be measured by with the usual settings."""


@dataclass(frozen=True)
class Kind:
    """One kind of run."""

    record: type[Record]
    """What it is read as."""
    write_report: Callable[[Path], Path]
    """Writes the report into its folder."""


KINDS: dict[str, Kind] = {
    Run.kind: Kind(Run, write_report),
    LandscapeRun.kind: Kind(LandscapeRun, write_landscape_report),
    ComparisonRun.kind: Kind(ComparisonRun, report_writer(ComparisonRun, account_of_comparison)),
    **{kind: Kind(study.record, report_writer(study.record, study.account)) for kind, study in STUDIES.items()},
}
"""By the kind that is written into the folder."""


def load_any(folder: Path | str) -> Record:
    """Read a run folder of whatever kind; tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete run, one of an unknown kind, or one written by another version.
    """
    kind = kind_of(folder)
    if kind not in KINDS:
        raise InputError(f"{folder} holds a run of the kind {kind!r}; this version knows {', '.join(KINDS)}.")
    return load_record(folder, KINDS[kind].record)


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """Return the runs of folders.

    Raises:
        InputError: for fewer than two, or as `load_any`.
    """
    if len(folders) < 2:
        raise InputError("give at least two run folders, or a task with at least two of --checkpoint.")
    return [load_any(folder) for folder in folders]


def measure_checkpoints(
    request: Request,
    checkpoints: Sequence[Path],
    of: str,
    *,
    parent: Path,
    listener: Listener | None = None,
) -> tuple[list[Record], list[Path]]:
    """Measure a task at several checkpoints with the usual settings, and return the runs and their folders.

    Each run gets a folder of its own, complete with its report, as soon as it is there.

    Args:
        request: which model, on what; its checkpoint is replaced.
        checkpoints: at least two.
        of: what to measure, out of `MEASUREMENTS`.
        parent: where the folders go.
        listener: told about progress.

    Raises:
        InputError: for fewer than two checkpoints, or an unknown measurement.
        CurvatureError: whatever stands in the way of a measurement.
    """
    if len(checkpoints) < 2:
        raise InputError(f"a comparison needs at least two of --checkpoint, got {len(checkpoints)}.")
    if of not in MEASUREMENTS:
        raise InputError(f"checkpoints can be compared by {', '.join(MEASUREMENTS)}, got {of!r}.")
    runs, folders = [], []
    for checkpoint in checkpoints:
        run, folder = _kept(replace(request, checkpoint=checkpoint), of, parent, listener or Listener())
        runs.append(run)
        folders.append(folder)
    return runs, folders


def _kept(request: Request, of: str, parent: Path, listener: Listener) -> tuple[Record, Path]:
    """Measure one checkpoint, with a folder of its own reserved before."""
    assert request.checkpoint is not None
    stem, places = request.checkpoint.stem, list[Place]()
    listener.when_loaded = lambda task, _: places.append(reserve_free(parent, f"{task.name}-{stem}"))
    try:
        run = _measured(request, of, listener)
        save_run(run, places[0], finish=KINDS[run.kind].write_report)
        return run, places[0].shown
    finally:
        for place in places:
            place.release()


def _measured(request: Request, of: str, listener: Listener) -> Record:
    if of == Run.kind:
        return run_inspection(request, InspectionPlan(), listener=listener)
    plan = SharpnessPlan() if of == "sharpness" else NoisePlan()
    return run_study(STUDIES[of], request, plan, listener=listener)
