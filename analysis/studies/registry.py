"""Every kind of run there is, by name: what wrote it, what reads it, and what writes its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.landscape_report import write_landscape_report
from analysis.landscape_store import LandscapeRun
from analysis.report import write_report
from analysis.store import Record, Run, kind_of, load_record
from analysis.studies.comparison import ComparisonRun, account_of_comparison
from analysis.studies.conditioning import CONDITIONING
from analysis.studies.critical import CRITICAL
from analysis.studies.implicit import IMPLICIT
from analysis.studies.noise import NOISE
from analysis.studies.report import report_writer
from analysis.studies.sharpness import SHARPNESS
from analysis.studies.study import Study
from curvature.errors import InputError

__all__ = ["KINDS", "STUDIES", "Kind", "load_any"]

STUDIES: dict[str, Study[Any, Any]] = {
    study.record.kind: study for study in (SHARPNESS, CONDITIONING, CRITICAL, NOISE, IMPLICIT)
}
"""By kind, which is also the name of the command."""


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
