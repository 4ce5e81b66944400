"""The site leaves nothing out: sources of formulas, questions for all that can be asked, breaks of the interface."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import analysis
import curvature
import optimizers
from analysis.registry import STUDIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROSE = (
    *DOCS.rglob("*.md"),
    *ROOT.glob("benchmarks/**/README.md"),
    *ROOT.glob("notebooks/[0-9]*.py"),
    ROOT / "README.md",
)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module", name="names")
def of_names() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield importlib.import_module("public_names")


@pytest.fixture(scope="module", name="citations")
def of_citations(names: ModuleType) -> ModuleType:
    return importlib.import_module(names.Source.__module__)


def computing(names: ModuleType) -> dict[str, str]:
    """Public functions, operators and optimizers: no drawings, and no records of results, plans or settings."""
    found = {}
    for listed in names.rooms().values():
        for public, place in listed.items():
            module, name = place.rsplit(".", 1)
            value = getattr(importlib.import_module(module), name)
            record = inspect.isclass(value) and (
                dataclasses.is_dataclass(value) or issubclass(value, (enum.Enum, Exception, dict)) or name == "Result"
            )
            if callable(value) and not record and not name.startswith("plot_"):
                found[public] = name
    return found


def texts() -> Iterator[tuple[str, str]]:
    for package in ("curvature", "optimizers", "analysis"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield str(path.relative_to(ROOT)), node.value
    for path in PROSE:
        if path.name != "bibliography.md":
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8").replace("\n# ", "\n")


def test_every_citation_is_in_the_bibliography_and_every_entry_is_cited(citations: ModuleType) -> None:
    """By the first author and the year at least, and by all names where all are given."""
    known = citations.sources()
    assert len({source.anchor for source in known}) == len(known) > 100
    lines = [line for line in page("bibliography.md").split("\n") if line.startswith("- ")]
    assert len(lines) == len(known)
    order = [(source.names[0].lower(), source.year) for source in known]
    assert order == sorted(order)
    cited = set()
    for place, text in texts():
        for match in citations.CITATION.finditer(text):
            meant = citations.meant(match, known)
            assert len(meant) == 1, f"{place}: {match[0]} is {len(meant)} entries of docs/bibliography.md"
            cited |= set(meant)
    assert set(known) == cited


def test_every_public_formula_has_a_source_or_a_reason_why_not(names: ModuleType) -> None:
    excused = set(re.findall(r"`(\w+)`", page("bibliography.md").split("## Formulas without a source")[1]))
    found = names.formula_sources()
    without = {name for public, name in computing(names).items() if not any(found[public])}
    assert without == excused


def test_pages_with_formulas_cite(citations: ModuleType) -> None:
    known = citations.sources()
    for path in ("concepts/which_matrix.md", "concepts/error_bars.md", "concepts/sharpness.md", "how_to/batch_size.md"):
        assert citations.cited(page(path), known), path


def test_the_questions_name_every_call_and_every_command(names: ModuleType) -> None:
    text = page("questions.md")
    code = " ".join(re.findall(r"`([^`]+)`", text))
    assert sorted(name for name in set(computing(names).values()) if not re.search(rf"\b{name}\b", code)) == []
    assert [kind for kind in (*STUDIES, "compare", "report") if f"curvature {kind} " not in code + " "] == []
    commands = page("start/command.md")
    assert [kind for kind in STUDIES if f"| `{kind}` |" not in commands] == []


def test_every_row_of_the_questions_has_all_its_cells() -> None:
    width = 0
    for line in page("questions.md").split("\n"):
        width = 0 if not line.startswith("|") else width or len(cells(line))
        assert not width or len(cells(line)) == width, line


def cells(line: str) -> list[str]:
    return re.sub(r"`[^`]*`|\\\|", "", line).strip().strip("|").split("|")


def signature(of: Callable[..., Any]) -> inspect.Signature:
    """With the settings of a plan in place of the plan."""
    found = inspect.signature(of)
    plan = found.parameters.get("plan")
    kind = getattr(analysis, plan.annotation, None) if plan is not None else None
    if not dataclasses.is_dataclass(kind):
        return found
    settings = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None) for f in dataclasses.fields(kind)
    ]
    return found.replace(parameters=[*(p for p in found.parameters.values() if p is not plan), *settings])


def test_calls_of_the_questions_take_their_arguments() -> None:
    """Names, keywords and their number; `...` stands for those that are left out."""
    public = {
        name: getattr(path, name)
        for path in (curvature.per_example, curvature.layerwise, optimizers, curvature, curvature.linalg, analysis)
        for name in path.__all__
    }
    seen = 0
    for code in re.findall(r"`([^`\n]+)`", page("questions.md")):
        if "(" not in code or code.startswith(("curvature ", ".")):
            continue
        for node in ast.walk(ast.parse(code.replace("lr=)", "lr=1)"))):
            if isinstance(node, ast.Call):
                place, name = node.func, ast.unparse(node.func).rsplit(".", 1)[-1]
                of_density = ast.unparse(place) == "linalg.effective_dimension"
                called = curvature.linalg.effective_dimension if of_density else public.get(name)
                given = [a for a in node.args if ast.unparse(a) != "..."]
                if called is not None:
                    bind = signature(called).bind if given == node.args else signature(called).bind_partial
                    bind(*given, **{k.arg or "": k for k in node.keywords})
                    seen += 1
    assert seen > 80


def test_old_names_are_gone_and_new_ones_are_there() -> None:
    """Of the first table of `docs/migration.md`; and what the changelog says has been renamed stands there."""
    paths = (curvature, curvature.linalg, curvature.layerwise, optimizers, analysis)
    public = {name for path in paths for name in path.__all__}
    text = page("migration.md")
    rows = [line.split(" | ") for line in text.split("## Paths")[0].split("\n") if line.startswith("| `")]
    before, now = ({n for row in rows for n in re.findall(r"\b[\w.]{4,}", row[i])} for i in (0, 1))
    assert before - public >= {"hutchinson_trace", "hutchinson_diagonal", "hutchpp", "xtrace", "top_eigenpairs"}
    assert {"trace", "diagonal", "eigsh", "optimizer_divisor", "analysis.CurvatureTracker"} <= now
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    renamed = re.findall(r"it was `(\w+)`|what was `(\w+)`|replaces `([A-Z]\w+)`|`(\w+)` before", changelog)
    assert len(renamed) > 3
    assert [name for name in map("".join, renamed) if name not in text] == []
