"""The parts of `make bench`: each names a suite and what it takes, and an interrupted run goes on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.common.parts import ELSEWHERE, PARTS, run

ROOT = Path(__file__).parents[2]


def test_every_part_is_a_command_of_its_own() -> None:
    assert all(find_spec(arguments[0]) for arguments in PARTS.values())
    assert len({tuple(arguments) for arguments in PARTS.values()}) == len(PARTS)
    assert PARTS["products-gpt"] == ["benchmarks.products.bench", "--problems", "gpt"]


def test_every_suite_is_a_part_and_on_the_page() -> None:
    commands = {
        path for path in (ROOT / "benchmarks").glob("*/*.py") if "= command(" in path.read_text(encoding="utf-8")
    }
    modules = {f"benchmarks.{path.parent.name}.{path.stem}" for path in commands if path.parent.name not in ELSEWHERE}
    assert modules == {arguments[0] for arguments in PARTS.values()}
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    pages = [f"../benchmarks/{path.parent.name}/README.md" for path in (ROOT / "benchmarks").glob("*/README.md")]
    rows = [f"../benchmarks/results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.json")]
    assert [link for link in (*pages, *rows) if f"({link}" not in text] == []


def test_an_interrupted_run_goes_on_and_a_complete_one_begins_anew(tmp_path: Path) -> None:
    measured: list[list[str]] = []

    def measure(arguments: list[str]) -> None:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(arguments)

    state = tmp_path / "runs" / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        run([], state, measure)
    first, second = list(PARTS)[:2]
    report = ["benchmarks.common.report"]
    assert measured == [PARTS[first], report, PARTS[second], report]
    assert list(json.loads(state.read_text(encoding="utf-8"))) == [first, second]
    again: list[list[str]] = []
    assert list(run([first], state, again.append)) == [first]
    assert list(run([], state, again.append)) == list(PARTS)[2:]
    assert again[2] == PARTS[list(PARTS)[2]]
    assert not state.exists()
