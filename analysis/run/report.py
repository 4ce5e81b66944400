"""The report of a run: one HTML page that needs nothing beside it, and its figures as PDF for papers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from analysis.run.record import Record
from analysis.run.saving import write_figure, write_text
from analysis.show.drawing import Colors
from analysis.show.page import COLORS, figure_html, panels, surface_html, surface_panel, templates
from analysis.show.report import Figure, Report

__all__ = ["page_of", "write_report"]


def write_report(run: Record, folder: Path) -> Path:
    """Write report.html and the figures as PDF into a run's folder, and return the page's path."""
    report, path = run.report(), folder / "report.html"
    write_text(path, page_of(run, report))
    for section in report.sections:
        for figure in section.figures:
            _on_paper(folder, figure)
        if section.surface is not None:
            _to_pdf(folder / "surface.pdf", (5.2, 4.4), partial(surface_panel, section.surface))
    return path


def page_of(run: Record, report: Report | None = None) -> str:
    """Return the report of a run as one self-contained HTML page."""
    figures, tables = count(1), count(1)
    report = run.report() if report is None else report
    sections = [
        {
            "told": section,
            "still": section.surface and surface_html(section.surface),
            "figures": [(next(figures), figure, figure_html(figure, COLORS)) for figure in section.figures],
            "tables": [(next(tables), table) for table in section.tables],
        }
        for section in report.sections
    ]
    return templates().get_template("report.html").render(run=run, report=report, sections=sections, tables=tables)


def _on_paper(folder: Path, figure: Figure) -> None:
    size = (4.8 * figure.panels, figure.height)
    _to_pdf(folder / f"{figure.name}.pdf", size, lambda f: panels(f, figure, Colors(), wide=True))


def _to_pdf(path: Path, size: tuple[float, float], draw: Callable[[Any], object]) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    draw(canvas)
    write_figure(path, canvas)
