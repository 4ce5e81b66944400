"""The benchmark measures what it says: the right matrix, per column, and a table that hides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import harness, peers, problems
from benchmarks.common.markdown import insert, markers
from benchmarks.common.report import TABLES
from benchmarks.common.summary_report import summary_table
from benchmarks.products.bench import middle
from benchmarks.products.report import table
from curvature import GGNOperator, HessianOperator, Objective


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        return model, torch.randn(5, 3), torch.randint(2, (5,))

    monkeypatch.setitem(problems.PROBLEMS, "tiny", make)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_problems_are_repeatable_and_of_the_stated_size(name: str) -> None:
    first, second = problems.make_problem(name), problems.make_problem(name)
    assert torch.equal(first.evaluate(), second.evaluate())
    assert first.num_params == {"mlp": 269_322, "cnn": 24_346, "gpt": 466_176}[name]
    assert not first.model.training


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("operator", "kind"), [("hessian", HessianOperator), ("ggn", GGNOperator)])
def test_reference_is_the_matrix(operator: peers.Operator, kind: Any) -> None:
    problem = problems.make_problem("tiny", dtype=torch.float64)
    product = harness._reference(problem, operator)
    dense = torch.stack([product(e) for e in torch.eye(problem.num_params, dtype=torch.float64)], dim=1)
    expected = kind(Objective(problem.model, problem.loss, (problem.inputs, problem.targets))).to_dense()
    torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["kept", "kept-16", "rebuilt", "by-hand"])
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_row_of_a_right_method(operator: peers.Operator, method: str) -> None:
    threads = torch.get_num_threads()
    row = harness.measure("tiny", operator, method, seconds=0.01, threads=1)
    torch.set_num_threads(threads)
    assert row.failure is None
    assert row.error is not None
    assert row.error < 1e-5
    assert row.rounds >= harness.MIN_ROUNDS
    assert row.columns == peers.METHODS[method].columns
    assert row.gradients is not None
    assert row.gradients_quartiles is not None
    assert row.gradients_quartiles[0] <= row.gradients <= row.gradients_quartiles[1]


def make_wrong(problem: problems.Problem, operator: peers.Operator) -> peers.Product:
    right = peers.by_hand(problem, operator)
    return lambda v: 1.01 * right(v)


def make_failing(problem: problems.Problem, operator: peers.Operator) -> peers.Product:
    raise RuntimeError(f"no {operator}\nfor {problem.name}")


def import_absent() -> None:
    raise ModuleNotFoundError("No module named 'absent'")


@pytest.mark.usefixtures("tiny")
def test_wrong_failing_and_absent_methods_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"label": "other", "load": lambda: None}
    for method in (
        peers.Method(name="wrong", make=make_wrong, **plain),
        peers.Method(name="failing", make=make_failing, **plain),
        peers.Method(name="absent", make=make_failing, label="other", load=import_absent),
    ):
        monkeypatch.setitem(peers.METHODS, method.name, method)
    threads = torch.get_num_threads()
    wrong, failing, absent = (
        harness.measure("tiny", "hessian", name, seconds=0.01, threads=1) for name in ("wrong", "failing", "absent")
    )
    torch.set_num_threads(threads)
    assert wrong.error == pytest.approx(0.01, rel=1e-2)
    assert failing.failure == "RuntimeError: no hessian for tiny"
    assert absent.failure == "ModuleNotFoundError: No module named 'absent'"


def row(problem: str, method: str, gradients: float, **fields: Any) -> dict[str, Any]:
    base = {"problem": problem, "operator": "hessian", "method": method, "label": method, "num_params": 1234}
    figures = {"gradients": gradients, "extra_mebibytes": 40.4, "error": 4e-7, "attention": "as in the model"}
    facts = {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "threads": 1, "clock": "process CPU time"}
    return {**base, **figures, **facts, **fields}


def test_table_shows_costs_errors_and_failures() -> None:
    rows = [
        row("mlp", "kept", 1.49),
        row("gpt", "kept", 1.92),
        row("mlp", "cheap", 0.5, error=0.03),
        row(
            "gpt",
            "cheap",
            2.06,
            attention="math kernel, set by the benchmark; without it: RuntimeError: a|b `c`. Please",
        ),
        row("mlp", "broken", 0, failure="ValueError: no"),
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "| Hessian product | MLP, 1k | GPT, 1k |"
    assert lines[2] == "| **torch-curvature**, kept | **1.5** (+40 MiB) | **1.9** (+40 MiB) |"
    assert lines[3] == "| cheap | 0.5 (+40 MiB), wrong by 3 % | 2.1 (+40 MiB)<sup>1</sup> |"
    assert lines[4] == "| broken | fails<sup>2</sup> |  |"
    assert lines[6] == ("1. Under the math kernel for attention, set by the benchmark; else `RuntimeError: a\\|b 'c'`")
    assert lines[7] == "2. `ValueError: no`"
    assert "all agree to 4e-07, except where the table says wrong" in lines[-1]


def test_middle_run_is_the_median_and_keeps_all_costs() -> None:
    runs = [row("mlp", "kept", cost) for cost in (1.6, 1.4, 1.5)]
    chosen = middle(runs)
    assert chosen["gradients"] == 1.5
    assert chosen["gradients_runs"] == [1.6, 1.4, 1.5]
    assert middle([*runs, row("mlp", "kept", 0, failure="died")])["failure"] == "died"


def test_insertion_replaces_only_what_is_between_the_markers() -> None:
    begin, end = markers("products")
    text = f"before\n{begin}\nold\n{end}\nafter"
    once = insert(text, "new\n")
    assert once == f"before\n{begin}\nnew\n{end}\nafter"
    assert insert(once, "new\n") == once
    for bad in ("nothing", f"{end} {begin}", text + text):
        with pytest.raises(ValueError, match="must hold"):
            insert(bad, "new\n")


def test_every_table_has_a_place() -> None:
    root = Path(__file__).parents[2]
    text = "".join((root / file).read_text(encoding="utf-8") for file in ("README.md", "docs/benchmarks.md"))
    for name in TABLES:
        assert insert(text, "", name) != text


def test_summary_names_the_best_that_is_right() -> None:
    def product(method: str, gradients: float, error: float) -> dict[str, object]:
        facts = {"problem": "mlp", "operator": "hessian", "columns": 1, "num_params": 5000, "failure": None}
        return {**facts, "method": method, "label": method + " 1.0, kept", "gradients": gradients, "error": error}

    def pairs(method: str, seconds: float, right: bool) -> dict[str, object]:
        facts = {"problem": "net", "k": 10, "failure": None, "label": method}
        return {**facts, "method": method, "seconds": seconds, "right": right}

    products = [product("kept", 1.5, 0.0), product("quick", 1.0, 0.5), product("slow", 3.0, 0.0)]
    eigen = [pairs("eigsh", 2.0, True), pairs("hasty", 1.0, False), pairs("sound", 5.0, True)]
    lines = summary_table(products, eigen).splitlines()
    assert lines[2:] == [
        "| Hessian product, MLP with 5k parameters | **1.5 gradients** | 3.0 gradients, slow 1.0 | 2.0x |",
        "| 10 largest eigenpairs, trained net | **2.0 s** | 5.0 s, sound | 2.5x |",
    ]
