"""The Python of the README runs as it stands, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from curvature.adapters import hugging_face

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    exec(compile(blocks[0], "README.md", "exec"), names)
    printed = capsys.readouterr().out
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert names["loss"] == names["loss"].detach()
    (promised,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)

    def fields(text: str) -> list[str]:
        return [line.split()[0] for line in text.splitlines()]

    def eigenvalues(text: str) -> list[float]:
        return [float(x) for x in re.findall(r"eigenvalues +\[(.*?)\]", text)[0].split(", ")]

    assert fields(printed) == fields(promised)
    assert eigenvalues(printed) == pytest.approx(eigenvalues(promised), rel=1e-3)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_adapter_it_names_is_there() -> None:
    assert "hugging_face.causal_lm_objective" in README
    assert callable(hugging_face.causal_lm_objective)
