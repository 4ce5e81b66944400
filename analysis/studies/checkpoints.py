"""From folders, or from checkpoints of a task, to the runs that are to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.plan import InspectionPlan
from analysis.preparation import Request
from analysis.reservation import Place, reserve_free
from analysis.store import Record, Run, save_run
from analysis.studies.noise import NoisePlan
from analysis.studies.registry import KINDS, STUDIES, load_any
from analysis.studies.sharpness import SharpnessPlan
from analysis.studies.study import StudyListener, run_study
from analysis.workflow import InspectionListener, run_inspection
from curvature.errors import InputError

__all__ = ["MEASUREMENTS", "CompareListener", "measure_checkpoints", "read_runs"]

MEASUREMENTS = ("inspection", "sharpness", "noise")
"""Kinds of runs that checkpoints can be measured by with the usual settings."""


class CompareListener(InspectionListener, StudyListener):
    """Told how the runs get on; this one keeps it to itself."""


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
    listener: CompareListener | None = None,
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
        run, folder = _kept(replace(request, checkpoint=checkpoint), of, parent, listener or CompareListener())
        runs.append(run)
        folders.append(folder)
    return runs, folders


def _kept(request: Request, of: str, parent: Path, listener: CompareListener) -> tuple[Record, Path]:
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


def _measured(request: Request, of: str, listener: CompareListener) -> Record:
    if of == Run.kind:
        return run_inspection(request, InspectionPlan(), listener=listener)
    plan = SharpnessPlan() if of == "sharpness" else NoisePlan()
    return run_study(STUDIES[of], request, plan, listener=listener)
