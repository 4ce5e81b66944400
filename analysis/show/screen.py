"""What the command shows on a terminal: what it is about to cost, how far it has come, and the tables at the end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from analysis.show.listener import Listener
from analysis.show.report import Report, Table
from analysis.show.terminal import Output
from analysis.show.wording import duration

__all__ = ["Screen", "show_report"]

_PLAIN_WIDTH = 132  # of files and pipes, which have no width of their own


class _Bar(Progress):
    """A progress bar, and below it what a measurement shows of itself as it goes."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return both."""
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below)


class Screen(Listener):
    """A console that is told how a measurement gets on; as a context, it takes the progress bar away at the end.

    Args:
        stderr: write there instead of to stdout, which is then left to the results.
    """

    def __init__(self, *, stderr: bool) -> None:
        self.output = output = Output(stderr=stderr)
        width = None if output.isatty() else _PLAIN_WIDTH
        self._console = Console(
            file=output,  # type: ignore[arg-type]  # it has all that is asked of a stream
            highlight=False,
            markup=False,
            emoji=False,
            width=width,
        )
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
            TimeRemainingColumn(),
        )
        self._progress = _Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
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

    def say(self, what: str | Grid) -> None:
        """Print a line or a table."""
        self._console.print(what)

    def advanced(self, stage: str, done: int, planned: int) -> None:
        stage, _, self._progress.below = stage.partition("\n")
        self._progress.update(self._bar, description=stage, completed=done, total=planned)

    def last_line(self, text: str) -> None:
        """Print a line that is never wrapped, so that it can be read by programs."""
        self._console.print(text, soft_wrap=True)


def show_report(screen: Screen, report: Report, seconds: float | None) -> None:
    """Print the report without its figures, and its cost where something was measured."""
    moved = any(card.data for card in report.cards)
    table = _new_table(report.title, "", "value", "uncertainty", *(["other data"] if moved else []), "")
    table.columns[-1].justify = "left"
    for card in report.cards:
        table.add_row(card.label, card.value, card.error, *([card.data] if moved else []), card.hint)
    screen.say(table)
    for section in report.sections:
        for part in section.tables:
            if part.on_screen:
                screen.say(_table(section.title, part))
    answers = Grid.grid(padding=(0, 2, 0, 0))
    answers.add_column(overflow="fold", ratio=1)
    for finding in report.findings:
        answers.add_row(f"\n{finding.question}\n  {finding.answer}")
    screen.say(answers)
    for note in report.notes:
        screen.say(f"note: {note}")
    if seconds is not None:
        screen.say(f"\nspent: {', '.join((*report.facts, duration(seconds)))}")


def _table(title: str, table: Table) -> Grid:
    grid = _new_table(title, *table.columns)
    for column in grid.columns[len(table.columns) - table.num_prose :]:
        column.justify = "left"
    for row in table.rows:
        grid.add_row(*row)
    return grid


def _new_table(title: str, *columns: str) -> Grid:
    """Return a table of the kind all commands print: names to the left, numbers to the right."""
    style: Any = {"title_justify": "left", "title_style": "bold", "box": None, "pad_edge": False}
    table = Grid(title=f"\n{title}", header_style="dim", min_width=len(title), **style)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table
