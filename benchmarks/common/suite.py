"""What the command of every suite does around its measurements: options, progress, the file of rows."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.run.saving import write_text

__all__ = ["RESULTS", "ROOT", "Row", "Rows", "command", "stored"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def command(suite: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the options of a suite's command: `--out`, the file of its rows, to which it adds its own.

    Everything runs on one thread, and other libraries' deprecation warnings are not shown.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{suite}.bench",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{suite}.json", help="rows that are not measured stay")
    return parser


def stored(out: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    rows: list[Row] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    return rows


class Rows:
    """The rows of a file, written with each that is added, so that a run can be cut short.

    Args:
        out: the file.
        key: what tells rows apart; rows that are measured again are replaced, others stay.
        total: how many steps the bar counts.
        finish: what is done to all rows before they are written: their order, what compares them.
    """

    def __init__(
        self, out: Path, key: Sequence[str], total: int, finish: Callable[[list[Row]], list[Row]] = list
    ) -> None:
        self.out, self.rows, self._key, self._finish = out, stored(out), key, finish
        self._facts = {"torch": str(torch.__version__), "python": platform.python_version(), "git": _git()}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Rows:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str) -> None:
        """Show what is being measured."""
        self._progress.update(self._task, description=description)

    def add(self, *rows: Row, said: str = "", steps: int = 1) -> None:
        """Put rows in the place of those with the same key, write all, and show what is to be said of them."""
        new = [{**row, **self._facts} for row in rows]
        again = {self._key_of(row) for row in new}
        place = next((i for i, row in enumerate(self.rows) if self._key_of(row) in again), len(self.rows))
        rest = [row for row in self.rows if self._key_of(row) not in again]
        self.rows = self._finish([*rest[:place], *new, *rest[place:]])
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, "[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
        if said:
            self._progress.console.print(said, highlight=False, soft_wrap=True)
        self._progress.advance(self._task, steps)

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self._key)


def _git() -> str:
    """Return the abbreviated commit of this tree, with "-dirty" if tracked files differ from it."""
    said = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(said, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
