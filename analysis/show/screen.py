"""What the command shows on a terminal: what it is about to cost, how far it has come, and the tables at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from analysis.show.listener import Listener
from analysis.show.terminal import Output

__all__ = ["Screen", "new_table"]

_PLAIN_WIDTH = 132  # of files and pipes, which have no width of their own


class Screen(Listener):
    """A console that is told how a measurement gets on; as a context, it takes the progress bar away at the end.

    Args:
        stderr: write there instead of to stdout, which is then left to the results.
    """

    def __init__(self, *, stderr: bool) -> None:
        self.output = output = Output(stderr=stderr)
        width = None if output.isatty() else _PLAIN_WIDTH
        self._console = Console(file=output, highlight=False, markup=False, emoji=False, width=width)  # type: ignore[arg-type]
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._bar = self._progress.add_task("starting", total=None, visible=False, unit="")

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def loaded(self, what: str, size: str) -> None:
        self._console.print(what)
        self._console.print(size)

    def doing(self, what: str) -> AbstractContextManager[object]:
        self._progress.stop()  # of an earlier measurement: one display at a time
        return self._console.status(what)

    def priced(self, estimate: str, total: int, unit: str) -> None:
        self._console.print(estimate)
        self._progress.update(self._bar, total=total, visible=True, unit=unit)
        self._progress.start()

    def say(self, what: str | Table) -> None:
        """Print a line or a table."""
        self._console.print(what)

    def advanced(self, stage: str, done: int, planned: int) -> None:
        self._progress.update(self._bar, description=stage, completed=done, total=planned)

    def last_line(self, text: str) -> None:
        """Print a line that is never wrapped, so that it can be read by programs."""
        self._console.print(text, soft_wrap=True)


def new_table(title: str, *columns: str) -> Table:
    """Return a table of the kind all commands print: names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table
