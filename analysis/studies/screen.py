"""What the command of a study shows on a terminal: key numbers, what they say, and its tables."""

from __future__ import annotations

from rich.table import Table

from analysis import wording
from analysis.screen import Screen, new_table
from analysis.studies.account import Account, Sheet
from analysis.studies.checkpoints import CompareListener
from analysis.studies.study import StudyCost, StudyRun

__all__ = ["StudyScreen"]


class StudyScreen(Screen, CompareListener):
    """A console that listens to a study; as a context, it takes the progress bar away at the end."""

    unit = "stages"

    def priced(self, cost: StudyCost) -> None:
        gradients = wording.number(cost.num_gradients, 2)
        each = wording.duration(cost.seconds_per_gradient)
        self.say(f"estimate: about {gradients} gradients of {each} each, {wording.duration(cost.expected_seconds)}")
        self.begin(1)

    def tell(self, run: StudyRun, account: Account) -> None:
        """Print all there is to tell but the figures."""
        table = new_table(f"\n{account.title}", "", "value", "uncertainty", "")
        table.columns[3].justify = "left"
        for card in account.cards:
            table.add_row(card.label, card.value, card.error, card.hint)
        self.say(table)
        for chapter in account.chapters:
            for sheet in chapter.sheets:
                if sheet.on_screen:
                    self.say(_table(chapter.title, sheet))
        answers = Table.grid(padding=(0, 2, 0, 0))
        answers.add_column(overflow="fold", ratio=1)
        for finding in account.findings:
            answers.add_row(f"\n{finding.question}\n  {finding.answer}")
        self.say(answers)
        for note in account.notes:
            self.say(f"note: {note}")
        if run.cost is not None:
            self.say(f"\nspent: {wording.duration(run.cost.seconds)}")


def _table(title: str, sheet: Sheet) -> Table:
    table = new_table(f"\n{title}", *sheet.columns)
    for column in table.columns[len(sheet.columns) - sheet.num_prose :]:
        column.justify = "left"
    for row in sheet.rows:
        table.add_row(*row)
    return table
