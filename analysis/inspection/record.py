"""The record of an inspection, and reading it from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from analysis.inspection.results import Inspection
from analysis.run.meter import CostEstimate
from analysis.run.store import Record, load_record

__all__ = ["Run", "load_run"]


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """One inspection, with what produced it."""

    kind: ClassVar[str] = "inspection"
    result: ClassVar[str] = "inspection"

    estimate: CostEstimate
    """Cost as predicted before the work; `inspection.cost` is what it came to."""
    inspection: Inspection
    """The results."""


def load_run(folder: Path | str) -> Run:
    """Read the folder of an inspection; the tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete inspection, or one written by a newer version.
    """
    return load_record(folder, Run)
