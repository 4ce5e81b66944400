"""A file that remembers points as they are computed, so that work that was interrupted goes on where it stopped.

One line of JSON a point, written and flushed as it is found; a line that was cut off is as if it had not been written.
Numbers are written in full, those that are not finite as "inf", "-inf" and "nan", so a landscape that was continued
equals one that was not, bit for bit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from analysis.run.lines import append_line, read_lines
from curvature.errors import InputError

__all__ = ["PointLog"]


class PointLog:
    """The points of a file, and those that are added to it.

    Args:
        path: of the file; it is made with its first point.

    Raises:
        InputError: if the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._points: dict[str, dict[int, tuple[float, float]]] = {}
        self._keys: dict[str, str] = {}
        self.num_points = 0
        self.num_known = 0
        """How many were taken from an earlier call."""
        self.failed = False
        """Whether the file took no more points."""
        if path.exists():
            self._read()

    def known(self, section: str, key: str) -> dict[int, tuple[float, float]]:
        """Return place -> (loss, standard error) of the points of a section.

        Raises:
            InputError: if they were computed for another point, other data or another grid.
        """
        if self._keys.get(section, key) != key:
            raise InputError(
                f"{self.path} holds points of another landscape ({section}: other parameters, data, directions or "
                "grid); give the settings it was begun with, or delete it and begin again."
            )
        points = dict(self._points.get(section, {}))
        self.num_known += len(points)
        return points

    def note(self, section: str, key: str, place: int, loss: float, stderr: float) -> None:
        """Add a point. Where the file can be written to no more, points are kept in memory alone.

        Raises:
            InputError: if the first point cannot be written.
        """
        record = {"section": section, "key": key, "place": place, "loss": _plain(loss), "stderr": _plain(stderr)}
        try:
            if not self.failed:
                append_line(self.path, json.dumps(record))
        except OSError as error:
            if self.num_points == 0:
                raise InputError(f"cannot write to {self.path}: {error.strerror}; choose another place.") from error
            self.failed = True
        self._add(section, key, place, loss, stderr)

    def _add(self, section: str, key: str, place: int, loss: float, stderr: float) -> None:
        self._keys.setdefault(section, key)
        if self._keys[section] == key:
            self._points.setdefault(section, {})[place] = (loss, stderr)
            self.num_points += 1

    def _read(self) -> None:
        try:
            lines = read_lines(self.path, repair=True)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path} cannot be read ({error}); delete it and begin again.") from error
        for line in lines:
            try:
                r = json.loads(line)
                self._add(r["section"], r["key"], int(r["place"]), _number(r["loss"]), _number(r["stderr"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{self.path} holds lines that are no points; delete it and begin again.") from error


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
