"""What every run states, whatever was measured: task, settings, seed, versions, checkpoint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any, ClassVar

import numpy as np
import torch

from analysis.show.report import Report
from curvature.results.record import Result, to_plain

__all__ = ["Record", "now", "versions"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Record(Result):
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
        """Return the report of it, for terminal and page; each kind of record has its own."""
        raise NotImplementedError

    def stored(self) -> dict[str, Any]:
        """Return all but the large arrays as JSON can hold it, numbers that are not finite among it."""
        free = ("metadata", "settings")  # where a word could be a word
        return {
            f.name: to_plain(getattr(self, f.name), number=_number_or_mark if f.name in free else _number_or_word)
            for f in fields(self)
        }

    def _told(self) -> list[tuple[str, Any]]:
        found = getattr(self, self.result)
        parts = [part for _, part in found._items() if isinstance(part, Result)]
        told = [pair for part in (parts or [found]) for pair in part._told()]
        return [("task", self.name), ("created", self.created), *told]

    def plot(self, **settings: Any) -> Any:
        """Draw the result, as its own `plot` does."""
        return getattr(self, self.result).plot(**settings)

    def to_json(self) -> str:
        """Return `to_dict` in one line of JSON, with numbers that are not finite as the run folder has them."""
        return json.dumps(self.stored(), allow_nan=False)


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


def _number_or_word(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number_or_mark(value: float) -> float | dict[str, str]:
    return value if math.isfinite(value) else {"number": str(value)}
