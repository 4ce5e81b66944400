"""Citations: which entry of the bibliography a name with a year means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BIBLIOGRAPHY = Path(__file__).parent / "bibliography.md"

_NAME = r"(?:(?:van der|van|de|Van|Le|the OpenAI Dota) )?[A-Z][\w'-]*(?<!Xiv)(?<!In)|the OpenAI Dota team"
CITATION = re.compile(
    (
        rf"\b(?P<names>(?:{_NAME})(?:, (?:{_NAME}))*(?:,? and (?:{_NAME}))?)(?P<others> et al\.)?"
        r",? (?P<open>\()?(?P<year>(?:18|19|20)\d\d)\b(?(open)\)?)"
    ).replace(" ", r"\s+")
)
"""Names and a year, as in Koh and Liang (2017), (Koh and Liang, 2017) or Cohen et al. (2021)."""
ENTRY = re.compile(r"^- \*\*(.+) \((\d{4})\)\*\* ", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """An entry of the bibliography."""

    names: tuple[str, ...]
    year: str

    @property
    def anchor(self) -> str:
        """Where the bibliography has it."""
        return re.sub(r"[^a-z0-9]+", "-", " ".join((*self.names[:2], self.year)).lower())

    @property
    def short(self) -> str:
        """As a text cites it."""
        names = " and ".join(filter(None, (", ".join(self.names[:-1]), self.names[-1])))
        return f"{names if len(self.names) < 4 else self.names[0] + ' et al.'} ({self.year})"


def _split(names: str) -> tuple[str, ...]:
    return tuple(re.split(r",? and |, ", " ".join(names.split())))


def sources() -> list[Source]:
    """Return the entries of the bibliography."""
    text = BIBLIOGRAPHY.read_text(encoding="utf-8")
    return [Source(_split(names), year) for names, year in ENTRY.findall(text)]


def meant(match: re.Match[str], known: list[Source]) -> list[Source]:
    """Return the entries that a citation may mean: one where all is well.

    Names must be all that the entry has, or its first ones with "et al.".
    """
    names = _split(match["names"])
    return [
        source
        for source in known
        if source.year == match["year"] and names == (source.names[: len(names)] if match["others"] else source.names)
    ]


def cited(text: str, known: list[Source]) -> list[Source]:
    """Return the entries that a text cites, each once."""
    return list(dict.fromkeys(source for match in CITATION.finditer(text) for source in meant(match, known)))
