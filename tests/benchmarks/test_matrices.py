"""The suite of matrix optimizers: its runs step what they say, and its table has the best rate."""

from __future__ import annotations

import math

import pytest

from benchmarks.matrices import bench
from benchmarks.matrices.bench import METHODS, RACE, race, run_row
from benchmarks.matrices.report import matrices_table, race_table
from optimizers import KFAC


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_of_the_autoencoder(method: str) -> None:
    row = run_row("autoencoder", method, METHODS[method][1][0], seed=0, steps=3)
    assert math.isfinite(row["loss"])
    assert [point[0] for point in row["curve"]] == [1, 2, 3]
    assert row["curve"][-1][3] < 0.35
    assert row["gradients"] == pytest.approx(3) or row["gradients"] > 3


def test_the_table_has_the_best_rate_and_its_further_seeds() -> None:
    known = {"torch": "2", "device": "cpu", "dtype": "float32", "threads": 1, "clock": "cpu"}
    run = {"kind": "run", "problem": "gpt", "method": "SOAP", "steps": 10, "gradients": 10, "seconds": 2.0, **known}
    rows = [
        {"kind": "cost", "problem": "wide", "method": "SOAP", "due": 2.0, "other": 1.1, "adamw_steps": 1.19, **known},
        {**run, "lr": 0.1, "seed": 0, "loss": 2.5},
        {**run, "lr": 0.01, "seed": 0, "loss": 1.5},
        {**run, "lr": 0.01, "seed": 1, "loss": 1.625},
    ]
    table = matrices_table(rows)
    assert "| wide: SOAP | 2.00 | 1.10 | 1.19 |" in table
    assert "| gpt: SOAP, lr 0.01 | 10 | 10 | 2 | 1.50, 1.62 |" in table


def test_the_race_tunes_on_beyond_an_end_and_gives_all_the_time_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.STEPS, "logistic", 10)
    rows = list(race("logistic", ["GaussNewton"], seeds=2))
    of_adamw = [row for row in rows if row["method"] == "AdamW" and row["equal"] == "steps"]
    tried = [row["lr"] for row in of_adamw if row["seed"] == 0]
    best = min((row for row in of_adamw if row["seed"] == 0), key=lambda row: row["loss"])["lr"]
    assert len(tried) == len(set(tried)) <= len(RACE["AdamW"][1]) + bench.FURTHER_RATES
    assert min(tried) < best < max(tried) or len(tried) == len(RACE["AdamW"][1]) + bench.FURTHER_RATES
    assert [row["lr"] for row in of_adamw if row["seed"] == 1] == [best]
    longer = {row["method"]: row["steps"] for row in rows if row["equal"] == "time"}
    assert longer["GaussNewton"] < longer["AdamW"] == bench.LONGER * 10
    table = race_table(rows)
    assert [line.split(" |")[0] for line in table.splitlines()[2:4]] == ["| AdamW", "| GaussNewton"]


def test_the_race_says_who_is_ahead_of_adamw_and_who_behind_on_every_seed() -> None:
    known = {"torch": "2", "device": "cpu", "dtype": "float32", "threads": 1, "clock": "cpu"}
    run = {"kind": "race", "problem": "gpt", "equal": "time", "steps": 10, "seconds": 2.0, "failure": None, **known}
    losses = {"AdamW": (2.0, 3.0), "Lion": (1.5, 2.5), "Muon": (1.5, 3.5), "SOAP": (2.5, None), "KFAC": (None, None)}
    rows = [{**run, "method": m, "lr": 0.1, "seed": s, "loss": x} for m, of in losses.items() for s, x in enumerate(of)]
    rows.append({**run, "method": "Lion", "lr": 0.3, "seed": 0, "loss": 1.6})
    table = race_table(rows)
    said = "Least median at equal time: Lion. Ahead of AdamW on every seed: Lion. Behind it on every seed: SOAP."
    assert said in table
    assert "equal steps:" not in table
    assert "| 0.1 (the last tried) | 10 | 2 (1.5 to 2.5) |" in table
    assert "| 0.1 | 10 | 2.5 (2 to 3) |" in table


def test_methods_that_need_the_calls_of_layers_are_left_out_where_these_go_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bench.STEPS, "poisson", 1)
    assert {row["method"] for row in race("poisson", ["KFAC", "Lion"], seeds=1)} == {"AdamW", "Lion"}
    task = bench.PROBLEMS["poisson"](0)
    optimizer = KFAC(task.model.parameters(), loss=task.loss)
    optimizer.step(lambda: (task.model(task.fixed[0]), task.fixed[1]))
    assert all(route.startswith("AdamW") for route in optimizer.routes().values())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_method_that_cannot_train_says_why() -> None:
    row = run_row("poisson", "GaussNewton, 10 iterations, matrix of a quarter", 1.0, seed=0, steps=2)
    assert row["loss"] is None
    assert "must match the size" in row["failure"]
