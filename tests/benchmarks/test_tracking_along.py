"""The figures of the tracker's benchmark are those of its readings."""

from __future__ import annotations

from benchmarks.tracking.along import EDGES, RUNS, accuracy, critical, edge


def test_rows_of_few_steps() -> None:
    found = accuracy("mlp, adam", steps=4)
    assert (found["steps"], found["compared"]) == (4, 2)
    assert found["error_max"] < 0.05
    assert 2 <= found["products_per_step"] <= 8 < found["products_first"] + 4
    steps = critical("mlp, gd", steps=5, every=4)
    assert (steps["readings"], steps["bracketed"], steps["statuses"]) == (2, 2, {"OK": 2})
    assert steps["error_max"] < 0.05
    assert steps["losses_max"] <= 6


def test_every_band_holds_what_other_code_found() -> None:
    assert all(low < 1 < high for _, _, _, (low, high) in EDGES.values())
    assert {name.split(",")[0] for name in RUNS} == {"mlp", "cnn", "gpt"}
    row = edge("gd, 0.6", steps=3, every=1, begin=1)
    assert 0.6 < row["ratio_mean"] < 0.9
    assert not row["within_band"]


def test_products_are_those_of_a_step_not_of_a_reading() -> None:
    found = accuracy("mlp, adam", steps=7, every=3)
    assert (found["steps"], found["every"], found["name"]) == (7, 3, "mlp, adam, probe, every 3 steps")
    assert 0 < 6 * found["products_per_step"] < 2 * found["products_first"]  # two readings in six steps
