"""The suite of matrix optimizers: its runs step what they say, and its table has the best rate."""

from __future__ import annotations

import math

import pytest

from benchmarks.matrices.bench import METHODS, run_row
from benchmarks.matrices.report import matrices_table


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
