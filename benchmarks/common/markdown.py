"""What the tables share: footnotes, conditions, and their places in a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["conditions", "insert", "marked", "markers"]


def marked(text: str, footnotes: list[str]) -> str:
    """Return the mark of a footnote, which is added unless it is there."""
    if text not in footnotes:
        footnotes.append(text)
    return f"<sup>{footnotes.index(text) + 1}</sup>"


def conditions(rows: Sequence[dict[str, Any]]) -> str:
    """Return a sentence on what the rows were measured with."""
    facts = {key: sorted({str(row[key]) for row in rows}) for key in ("torch", "device", "dtype", "threads", "clock")}
    said = {key: " and ".join(values) for key, values in facts.items()}
    return f"torch {said['torch']}, {said['device']}, {said['dtype']}, threads: {said['threads']}, {said['clock']}."


def markers(name: str) -> tuple[str, str]:
    """Return what stands before and after the table of this name."""
    return f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"


def insert(text: str, content: str, name: str = "products") -> str:
    """Return `text` with what stands between the two markers of `name` replaced by `content`.

    Raises:
        ValueError: if it does not hold both markers, once and in order.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"the text must hold {begin} and, after it, {end}, once each; put them where the table belongs."
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"
