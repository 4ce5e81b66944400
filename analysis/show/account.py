"""What a measurement has to tell, apart from where it is told: the terminal and the report both take it from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.records.measured import Measured
from analysis.show.drawing import Colors
from analysis.show.wording import value_and_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Account", "Card", "Chapter", "Finding", "Picture", "Sheet"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One key number, in words."""

    label: str
    """What it is called, in two or three words."""
    value: str
    """The number, with its unit where it has one."""
    error: str = ""
    """Its uncertainty."""
    hint: str = ""
    """What it is, in a phrase."""

    @classmethod
    def of(cls, label: str, measured: Measured, hint: str) -> Card:
        """Return the card of a number with its uncertainty."""
        value, error = value_and_error(measured)
        return cls(label=label, value=value, error=error, hint=hint)


@dataclass(frozen=True)
class Finding:
    """A question that one asks of a trained model, and the answer its curvature gives."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of one pair of axes."""

    name: str
    """Of its file, unique within the account."""
    label: str
    """What it shows, in a sentence, for those who cannot see it."""
    caption: str
    """How to read it."""
    draw: Callable[[Axes, Colors], object]
    """Draws it."""
    height: float = 2.9
    """Inches."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table; its first column names the rows."""

    caption: str
    """What it shows."""
    columns: tuple[str, ...]
    """Headings, with units."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are read."""
    num_prose: int = 0
    """So many of the last columns hold sentences, not numbers."""
    on_screen: bool = True
    """Whether the command prints it, too."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Figures and tables that belong together."""

    title: str
    """The question or matter they are about."""
    pictures: tuple[Picture, ...] = ()
    sheets: tuple[Sheet, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Account:
    """All that a report says of one measurement, but what every report says."""

    title: str
    """What was measured."""
    facts: tuple[str, ...]
    """Size, data, precision: short phrases."""
    cards: tuple[Card, ...]
    """Key numbers."""
    findings: tuple[Finding, ...]
    """What they say."""
    chapters: tuple[Chapter, ...]
    """Figures and tables."""
    terms: tuple[tuple[str, str], ...]
    """Words that need explaining, and their meaning."""
    method: str
    """How it was computed."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
