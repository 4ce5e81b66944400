"""What a measurement has to tell, apart from where it is told: the terminal and the page both take it from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.records.measured import Measured
from analysis.show.wording import over_data, value_and_error

if TYPE_CHECKING:
    from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]  # has no types

__all__ = ["Card", "Figure", "Finding", "Report", "Section", "Surface", "Table"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One key number, in words."""

    label: str
    """What it is called, in two or three words."""
    value: str
    """The number, with its unit where it has one."""
    error: str = ""
    """Its uncertainty."""
    data: str = ""
    """How far other data would move it."""
    hint: str = ""
    """What it is, in a phrase."""

    @classmethod
    def of(cls, label: str, measured: Measured, hint: str, *, percent: bool = False) -> Card:
        """Return the card of a number with its uncertainties."""
        value, error = value_and_error(measured, percent=percent)
        return cls(label=label, value=value, error=error, data=over_data(measured, percent=percent), hint=hint)


@dataclass(frozen=True)
class Finding:
    """A question that one asks of a trained model, and the answer its curvature gives."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of one or more axes: side by side where there is room, one below the other where there is not."""

    name: str
    """Of its file, unique within the report."""
    label: str
    """What it shows, in a sentence, for those who cannot see it."""
    caption: str
    """How to read it."""
    draw: Callable[[Any, Any], object]
    """Draws it: given the axes, a list of them where there are several panels, and `Colors`."""
    height: float = 2.9
    """Inches, where there is room."""
    narrow_height: float | None = None
    """Inches, in a narrow window; None: the height, at least 2.9."""
    panels: int = 1
    """Number of axes."""
    share_y: bool = False
    """Whether axes side by side share what stands on the left."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column names the rows."""

    caption: str
    """What it shows."""
    columns: tuple[str, ...]
    """Headings, with units."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are read; a row of a single cell goes across."""
    num_prose: int = 0
    """So many of the last columns hold sentences, not numbers."""
    signed: tuple[int, ...] = ()
    """Columns whose negative numbers stand out."""
    on_screen: bool = True
    """Whether the command prints it, too."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A surface that the reader turns."""

    data: dict[str, Any]
    """What the page's script draws it from."""
    label: str
    """What it shows, in a sentence."""
    draw: Callable[[Axes3D], object]
    """Draws it for paper, and where there are no scripts."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures and tables that belong together."""

    title: str
    """The question or matter they are about."""
    text: str = ""
    """What to know of all of them."""
    surface: Surface | None = None
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is said of one measurement, but what every report says."""

    title: str
    """What was measured."""
    facts: tuple[str, ...] = ()
    """Size, data, precision: short phrases."""
    cards: tuple[Card, ...]
    """Key numbers."""
    findings: tuple[Finding, ...]
    """What the numbers mean, as questions and answers."""
    sections: tuple[Section, ...]
    """Figures and tables."""
    terms: tuple[tuple[str, str], ...]
    """Words that need explaining, and their meaning."""
    method: str
    """How it was computed."""
    costs: tuple[Table, ...] = ()
    """What it cost, stage by stage."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
