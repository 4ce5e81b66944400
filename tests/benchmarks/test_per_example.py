"""The benchmark of per-example gradients measures the right quantities, and reports what is wrong or fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import problems
from benchmarks.common.problems import Problem
from benchmarks.per_example import bench as bench_per_example
from benchmarks.per_example.bench import METHODS, measure, table


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        return model, torch.randn(5, 3), torch.randint(2, (5,))

    monkeypatch.setitem(problems.PROBLEMS, "tiny", make)
    monkeypatch.setattr(bench_per_example, "MAX_ROUNDS", 5)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["torch-curvature", "vmap(grad)"])
@pytest.mark.parametrize("quantity", ["norms", "variance", "gradients"])
def test_row_of_a_right_method(quantity: str, method: str) -> None:
    row = measure("tiny", quantity, method, seconds=0.01)
    assert row["failure"] is None
    assert row["error"] < 1e-5
    assert row["rounds"] == 5
    assert row["N"] == 5


@pytest.mark.usefixtures("tiny")
def test_wrong_and_failing_methods_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(problem: Problem) -> Callable[[], Tensor]:
        raise RuntimeError(f"not for {problem.name}")

    right = METHODS["norms", "vmap(grad)"]
    monkeypatch.setitem(METHODS, ("norms", "failing"), failing)
    monkeypatch.setitem(METHODS, ("norms", "wrong"), lambda problem: lambda: 1.01 * right(problem)())
    rows = [measure("tiny", "norms", method, seconds=0.01) for method in ("failing", "wrong")]
    assert rows[0]["failure"] == "RuntimeError: not for tiny"
    assert rows[1]["error"] == pytest.approx(0.01, rel=1e-3)
    text = table(rows)
    assert "| norms (N,) | failing | fails |" in text
    assert "(wrong by 0.01)" in text
