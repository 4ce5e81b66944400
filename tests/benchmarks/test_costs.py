"""The costs of the questions are those of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.common.report import COSTS
from benchmarks.common.suite import RESULTS
from benchmarks.costs.bench import measure
from benchmarks.costs.calls import CALLS, NETS
from benchmarks.costs.report import EXCUSED, TEMPLATES, _cells, told, with_costs

QUESTIONS = Path(__file__).parents[2] / "docs" / "questions.md"
ROWS = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in COSTS]


def test_the_page_has_what_the_rows_say() -> None:
    text = QUESTIONS.read_text(encoding="utf-8")
    assert with_costs(text, *ROWS) == text
    changed = [{**row, "gradients": 12_345.0} for row in ROWS[0]]
    assert with_costs(text, changed, *ROWS[1:]).count("12 000 gradients") > 50


def test_every_row_of_the_page_is_measured_or_says_why_not() -> None:
    asked = [cells[0] for _, cells, _ in _cells(QUESTIONS.read_text(encoding="utf-8").split("\n"))]
    assert len(asked) > 70
    assert set(asked) == {*TEMPLATES, *EXCUSED}
    assert not TEMPLATES.keys() & EXCUSED.keys()


def test_every_call_is_measured_on_a_network_and_stands_on_the_page() -> None:
    there = {row["call"] for row in ROWS[0] if not row.get("failure")}
    assert there == set(CALLS)
    assert {row["net"] for row in ROWS[0]} <= set(NETS)
    groups = [named.split("|") for named in re.findall(r"\{([^}:]+)\}", " ".join(TEMPLATES.values()))]
    named = {group[0] for group in groups} | {f"step of {other}" for group in groups for other in group[1:]}
    assert named - {"adamw"} <= set(CALLS)


def test_costs_are_told_with_two_digits_and_of_networks_whose_gradient_is_long() -> None:
    rows = [
        {"net": "digits-mlp", "call": "run a", "gradients": 300.0, "products": None},
        {"net": "digits-cnn", "call": "run a", "gradients": 1.04, "products": None},
        {"net": "text-gpt", "call": "run b", "gradients": 12_345.6, "products": 31},
        {"net": "digits-cnn", "call": "run b", "failure": "took more than 5 s"},
        {"net": "digits-mlp", "call": "run c", "gradients": 1.0, "products": 1},
    ]
    assert told("run a", rows) == "1 gradient"
    assert told("run a|b", rows) == "1 to 12 000 gradients (31 products)"
    assert told("run c", rows) == "1 gradient† (1 product)"
    steps = [{"net": "digits-mlp", "call": f"step of {name}", "gradients": n} for name, n in (("sgd", 2.0), ("x", 7.0))]
    assert told("step of x", steps) == "3.5 steps of SGD†"
    with pytest.raises(ValueError, match="nothing was measured of run d"):
        told("run a|d", rows)


def test_a_call_that_is_three_gradients_costs_three(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.costs import bench, calls

    seen = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0]) * isinstance(module, torch.nn.Conv2d)

    def thrice(net: calls.Net) -> None:
        for _ in range(3):
            net.objective.release()
            net.objective.gradient()

    monkeypatch.setattr(bench.time, "process_time", lambda: float(seen))  # what it costs is what goes forward
    monkeypatch.setitem(CALLS, "thrice", calls.Call(thrice))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        row = measure("digits-cnn", "thrice")
    finally:
        hook.remove()
    assert row["gradients"] == pytest.approx(3.0)
    assert row["num_params"] == 14_458
