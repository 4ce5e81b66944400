"""The studies there are, by the name of their command, and reading back what one of them wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.implicit_study import IMPLICIT
from analysis.noise_study import NOISE
from analysis.sharpness_study import SHARPNESS
from analysis.store import kind_of, load_record
from analysis.study import Study, StudyRun
from curvature.errors import InputError

__all__ = ["STUDIES", "load_study"]

STUDIES: dict[str, Study[Any, Any]] = {study.record.kind: study for study in (SHARPNESS, NOISE, IMPLICIT)}
"""By kind, which is also the name of the command."""


def load_study(folder: Path | str) -> StudyRun:
    """Read the folder of a study of any kind; tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete study, or one written by another version.
    """
    kind = kind_of(folder)
    if kind not in STUDIES:
        raise InputError(f"{folder} holds a run of the kind {kind!r}, which is no study ({', '.join(STUDIES)}).")
    run: StudyRun = load_record(folder, STUDIES[kind].record)
    return run
