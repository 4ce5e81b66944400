"""The suite of double descent: its rows, on small settings."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")

from benchmarks.common.suite import RESULTS, stored
from benchmarks.descent.bench import CASES, curve_row, descent_table, stack_row


def test_rows_say_where_the_peak_is_and_what_stacks_save() -> None:
    row = curve_row("digits, random features", samples=40, repeats=3)
    assert row["test_loss_peak"] == 40
    assert row["threshold"] == [39, 40]
    assert row["closed_form_z"] < 20
    assert stack_row("mlp 8", steps=3, members=2)["ratio"] > 0


def test_stored_rows_hold_what_the_page_says() -> None:
    rows = {row["case"]: row for row in stored(RESULTS / "descent.json")}
    assert set(rows) <= {*CASES, "stack, mlp 8", "stack, mlp 64", "stack, cnn 4"}
    width = rows["digits, width"]
    assert width["threshold"][0] <= width["test_loss_peak"] <= width["threshold"][1]
    assert width["test_loss_standing"] > 3
    assert rows["digits, random features"]["test_loss_peak"] == 200
    assert rows["digits, random features"]["closed_form_z"] < 4
    samples, epochs, sequences = (rows[name] for name in ("digits, samples", "digits, epochs", "sequences, width"))
    assert samples["threshold"][0] <= samples["test_loss_peak"] <= samples["threshold"][1]
    assert samples["test_loss_standing"] > 3
    assert epochs["test_loss_peak"] is None
    assert min(epochs["test_error"]) < 0.6 * epochs["test_error"][-1]
    assert sequences["threshold"][0] <= sequences["test_loss_peak"] <= sequences["threshold"][1]
    assert sequences["test_loss_standing"] > 3
    assert len(descent_table(list(rows.values())).splitlines()) == 2 + len(rows) - 3
