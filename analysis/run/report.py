"""The report of a study: one HTML page that needs nothing beside it, and its figures as PDF for papers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from analysis.run.saving import write_figure, write_text
from analysis.run.store import load_record
from analysis.run.study import StudyRun
from analysis.show.account import Account, Picture
from analysis.show.drawing import Colors
from analysis.show.page import COLORS, templates, two_sizes

__all__ = ["build_account_report", "report_writer"]

R = TypeVar("R", bound=StudyRun)


def report_writer(record: type[R], tell: Callable[[R], Account]) -> Callable[[Path], Path]:
    """Return what writes report.html and the figures as PDF into a run folder of this kind."""

    def write(folder: Path) -> Path:
        run = load_record(folder, record)
        account = tell(run)
        path = folder / "report.html"
        write_text(path, build_account_report(run, account))
        for chapter in account.chapters:
            for picture in chapter.pictures:
                _to_paper(picture, folder / f"{picture.name}.pdf")
        return path

    return write


def build_account_report(run: StudyRun, account: Account) -> str:
    """Return the report of a study as one self-contained HTML page."""
    figures, tables = count(1), count(1)
    chapters = [
        {
            "title": chapter.title,
            "pictures": [(next(figures), p, _on_page(p)) for p in chapter.pictures],
            "sheets": [(next(tables), sheet) for sheet in chapter.sheets],
        }
        for chapter in account.chapters
    ]
    return templates().get_template("account.html").render(run=run, account=account, chapters=chapters)


def _on_page(picture: Picture) -> Any:
    return two_sizes(picture.name, picture.label, lambda ax: picture.draw(ax, COLORS), height=picture.height)


def _to_paper(picture: Picture, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, picture.height), layout="constrained")
    picture.draw(figure.subplots(), Colors())
    write_figure(path, figure)
