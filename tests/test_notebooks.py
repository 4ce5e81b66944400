"""Every notebook runs from top to bottom, its claims asserted, and stands beside its execution."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    pyplot.switch_backend("agg")
    try:
        runpy.run_path(str(source), run_name="__main__")
    finally:
        pyplot.close("all")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_execution_is_of_the_present_source(source: Path) -> None:
    """The .ipynb holds the same cells as the .py, each code cell executed in order and without an error."""
    jupytext = pytest.importorskip("jupytext")
    executed = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [("".join(cell["source"]).strip(), cell) for cell in executed["cells"]]
    assert [text for text, _ in cells] == [cell.source.strip() for cell in jupytext.read(source).cells]
    counts = [cell["execution_count"] for _, cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output["output_type"] == "error" for _, cell in cells for output in cell.get("outputs", []))
