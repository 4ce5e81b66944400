"""The benchmark of learning rates: the rules of range tests, the sweep, and its rows."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.common.suite import RESULTS
from benchmarks.tracking.rates import OPTIMIZERS, RULES, TASKS, finished, lightning_rule, lr_finder_rule, rows_of


def test_the_rules_choose_the_steepest_fall() -> None:
    """A loss that stays, falls at one rate and climbs: smoothing is slow, so the rule points at or after the fall."""
    for name, rule in (("pytorch-lr-finder", lr_finder_rule), ("Lightning", lightning_rule)):
        rates = RULES[name][0]
        assert (len(rates), rates[0]) == (100, {"pytorch-lr-finder": 1e-7, "Lightning": 1e-8}[name])
        assert rates[-1] == pytest.approx({"pytorch-lr-finder": 10.0, "Lightning": 1.0}[name])
        losses = [2.0] * 60 + [2.0 - 0.1 * i for i in range(15)] + [0.5] * 25
        assert 60 <= rates.index(rule(rates, losses)) <= 76
        assert math.isnan(rule(rates[:5], losses[:5]))
        early = [*losses[:80], *[1e3] * 20]  # the test ends there, and the rise is not a fall
        assert rates.index(rule(rates, early)) <= 82


def test_a_row_of_few_steps() -> None:
    row = rows_of("mlp", "sgd", steps=16, places=22, seeds=2)
    assert row["lower"] < row["upper"]
    assert len(row["points"]) == 3
    assert row["sweep_steps"] > 2 * row["tool_steps"] > 0
    assert set(row["guesses"]) >= {"pytorch-lr-finder", "Lightning", "critical step of the first update"}
    other = {**row, "task": "other", "point": 4.0, "guesses": {}}
    assert finished([row, other])[0]["guesses"]["constant"] == pytest.approx(4.0)


def test_the_rows_say_what_the_readme_says() -> None:
    rows = json.loads((RESULTS / "rates.json").read_text(encoding="utf-8"))
    assert {(row["task"], row["optimizer"]) for row in rows} == {(t, o) for t in TASKS for o in OPTIMIZERS}
    assert sum(row["holds"] for row in rows) >= 16
    assert sum(row["tool_steps"] for row in rows) < sum(row["sweep_steps"] for row in rows) / 3
    for row in rows:
        assert row["holds"] == (row["lower"] <= row["point"] <= row["upper"])
