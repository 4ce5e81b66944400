"""Pages of the site beside this folder's: README, notebooks, benchmarks, reference, contributing, changes."""

from __future__ import annotations

import html
import json
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from citations import CITATION, ENTRY, meant, sources
from public_names import pages, rooms

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "notebooks/*.ipynb", "benchmarks/README.md", "benchmarks/*/README.md")
DATA = ("benchmarks/results/*.json",)
LINK = re.compile(r"(!?\[[^\]\n]*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


CALL = re.compile(r"`((?:[a-z_]+\.)*([A-Za-z_]+)(?:\([^`]*)?)`")
KEPT = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)", re.DOTALL)
TAGS = re.compile(r"(<(pre|code|script|style|a|h\d)\b.*?</\2>|<[^>]*>)", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def _found(patterns: tuple[str, ...]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


ELSEWHERE = {path: path for path in _found((*PAGES, *DATA))} | {"README.md": "index.md", "notebooks": "gallery.md"}


def on_config(config: Any) -> Any:
    """Add reference, notebooks and suites of benchmarks to the navigation."""
    sections = {title: pages for entry in config.nav if isinstance(entry, dict) for title, pages in entry.items()}
    sections["Reference"][:0] = list(pages())
    sections["Gallery"] += [{_title(path): path} for path in _found(PAGES[2:3])]
    sections["Benchmarks"] += _found(PAGES[3:])
    return config


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add the files from elsewhere."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    for path in _found((*PAGES, *DATA)):
        files.append(File(path, str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the site's page of a file; a file that has none keeps its name only."""
    own = page.file.src_uri
    path_of_own = own if own in ELSEWHERE else "README.md" if own == "index.md" else f"docs/{own}"

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path_of_own), target))
        uri = ELSEWHERE.get(path) or path.removeprefix("docs/")
        if uri == path and path not in ELSEWHERE:  # a source file
            return text.strip("![]")
        return f"{text}({posixpath.relpath(uri, posixpath.dirname(own) or '.')}{anchor})"

    markdown = LINK.sub(moved, markdown)
    if own in ("index.md", "questions.md", "how_to/train.md"):
        up = posixpath.relpath(".", posixpath.dirname(own) or ".")
        rows = (_with_links(line, up) if line.startswith("|") else line for line in markdown.split("\n"))
        markdown = "\n".join(rows)
    if own == "bibliography.md":
        anchors = iter(sources())
        markdown = ENTRY.sub(lambda entry: f'- <span id="{next(anchors).anchor}"></span>{entry[0][2:]}', markdown)
    return markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Let citations lead to the bibliography, and write formulas of notebooks as MathML, which browsers draw."""
    own = page.file.src_uri
    if own.endswith(".ipynb"):
        content = _outside(KEPT, MATH, _formula, content)
    if own == "bibliography.md":
        return content
    place = posixpath.relpath("bibliography.html", posixpath.dirname(own) or ".")
    return _outside(TAGS, CITATION, lambda match: _cited(match, place), content)


def _outside(kept: re.Pattern[str], pattern: re.Pattern[str], new: Callable[[re.Match[str]], str], text: str) -> str:
    parts = kept.split(text)  # text, what is kept, its tag, text, ...
    parts[::3] = [pattern.sub(new, part) for part in parts[::3]]
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)


def _cited(match: re.Match[str], place: str) -> str:
    found = meant(match, SOURCES)
    return f'<a href="{place}#{found[0].anchor}">{match[0]}</a>' if found else match[0]


def _formula(match: re.Match[str]) -> str:
    display, inline = match[1], match[2]
    return convert(html.unescape(display or inline), display="block" if display else "inline")


def _title(notebook: str) -> str:
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    return next(line[2:].strip() for cell in cells for line in cell["source"] if line.startswith("# "))


def _with_links(row: str, up: str) -> str:
    """Let the calls of a table lead to their entries in the reference."""

    def linked(match: re.Match[str]) -> str:
        place = ENTRIES.get(match[2])
        return match[0] if place is None else f"[{match[0]}]({posixpath.join(up, place)})"

    return CALL.sub(linked, row)


SOURCES = sources()
ENTRIES = {
    public.rsplit(".", 1)[1]: f"reference/{room.replace('.', '/')}.md#{place}"
    for room, names in rooms().items()
    for public, place in names.items()
}
