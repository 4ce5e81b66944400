"""What the command of a study shows on a terminal: key numbers, what they say, and its tables."""

from __future__ import annotations

from rich.table import Table

from analysis.show import wording
from analysis.show.account import Account, Sheet
from analysis.show.screen import Screen, new_table

__all__ = ["show_study"]


def show_study(screen: Screen, account: Account, seconds: float | None) -> None:
    """Print all there is to tell but the figures, and what it took where something was measured."""
    table = new_table(f"\n{account.title}", "", "value", "uncertainty", "")
    table.columns[3].justify = "left"
    for card in account.cards:
        table.add_row(card.label, card.value, card.error, card.hint)
    screen.say(table)
    for chapter in account.chapters:
        for sheet in chapter.sheets:
            if sheet.on_screen:
                screen.say(_table(chapter.title, sheet))
    answers = Table.grid(padding=(0, 2, 0, 0))
    answers.add_column(overflow="fold", ratio=1)
    for finding in account.findings:
        answers.add_row(f"\n{finding.question}\n  {finding.answer}")
    screen.say(answers)
    for note in account.notes:
        screen.say(f"note: {note}")
    if seconds is not None:
        screen.say(f"\nspent: {wording.duration(seconds)}")


def _table(title: str, sheet: Sheet) -> Table:
    table = new_table(f"\n{title}", *sheet.columns)
    for column in table.columns[len(sheet.columns) - sheet.num_prose :]:
        column.justify = "left"
    for row in sheet.rows:
        table.add_row(*row)
    return table
