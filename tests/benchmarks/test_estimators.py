"""The benchmark of the estimators: products are counted, errors are against exact values, failures are rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import trained
from benchmarks.common.problems import Problem
from benchmarks.estimators import bench as bench_estimators
from benchmarks.estimators import reference as estimator_reference
from benchmarks.estimators.bench import distance, in_order, measure_estimator, to_one_per_cent
from benchmarks.estimators.methods import ESTIMATORS, Answer, Estimator
from benchmarks.estimators.reference import exact_diagonal, outer_eigenvalues
from benchmarks.estimators.report import estimator_table

OURS = [key for key, estimator in ESTIMATORS.items() if estimator.ours]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Problem]:
    monkeypatch.setattr(trained, "CACHE", tmp_path)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    problem = Problem("tiny", model, nn.CrossEntropyLoss(), torch.randn(30, 6).double(), torch.arange(30) % 3)
    threads = torch.get_num_threads()
    yield problem
    torch.set_num_threads(threads)


def dense_hessian(problem: Problem) -> Tensor:
    sizes = [p.numel() for p in problem.params]

    def loss(flat: Tensor) -> Tensor:
        W, b, V, c = (v.view_as(p) for v, p in zip(flat.split(sizes), problem.params, strict=True))
        return nn.functional.cross_entropy((problem.inputs @ W.T + b).tanh() @ V.T + c, problem.targets)

    flat = torch.cat([p.detach().reshape(-1) for p in problem.params])
    H: Tensor = torch.autograd.functional.hessian(loss, flat)
    return H


def test_references_are_exact_and_kept(tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    H = dense_hessian(tiny)
    torch.testing.assert_close(exact_diagonal(tiny), H.diagonal())
    spectrum = torch.linalg.eigvalsh(H)
    expected = spectrum[spectrum.abs().argsort(descending=True)[:5]]
    torch.testing.assert_close(outer_eigenvalues(tiny, "hessian", 5), expected)
    assert all(p.requires_grad for p in tiny.params)
    monkeypatch.setattr(estimator_reference, "by_hand", None)
    monkeypatch.setattr(estimator_reference, "_diagonal_of", None)
    torch.testing.assert_close(exact_diagonal(tiny), H.diagonal())
    torch.testing.assert_close(outer_eigenvalues(tiny, "hessian", 5), expected)


@pytest.mark.parametrize("key", OURS, ids=["-".join(key) for key in OURS])
def test_our_estimators_find_what_they_are_asked_for(tiny: Problem, key: Any) -> None:
    quantity = key[0]
    if quantity.endswith("pairs"):
        truth = outer_eigenvalues(tiny, "ggn" if quantity == "ggn-pairs" else "hessian", 5)
    else:
        diagonal = dense_hessian(tiny).diagonal()
        truth = diagonal.sum() if quantity == "trace" else diagonal
    tiny.model.float()
    problem = Problem("tiny", tiny.model, tiny.loss, tiny.inputs.float(), tiny.targets)
    row = measure_estimator(problem, truth, ESTIMATORS[key], 60, seeds=3)
    assert row["failure"] is None
    assert 0 < row["products"] <= 60
    assert row["stated"] is not None
    right = row["error"] < {"trace": 0.3, "diagonal": 0.6, "pairs": 1e-2, "ggn-pairs": 1e-2}[quantity]
    assert right or (key[1] == "ours-randomized_eigh" and row["stated"] == 0)  # this spectrum hardly decays; it says so
    assert row["error"] <= row["error_largest"]


def fake(estimate: Any) -> Estimator:
    def make(problem: Problem, _operator: Any, meter: Any) -> Any:
        return meter.watch(lambda X: torch.zeros(problem.num_params, X.shape[1]))

    return Estimator(name="fake", quantity="trace", label="fake", make=make, estimate=estimate)


def test_products_and_errors_are_those_of_the_seeds(tiny: Problem) -> None:
    def estimate(product: Any, num_matvecs: int, seed: int) -> Answer:
        product(torch.ones(tiny.num_params, num_matvecs + seed))
        return Answer(torch.tensor(2.0 + seed), stated=0.5)

    row = measure_estimator(tiny, torch.tensor(2.0).double(), fake(estimate), 30, seeds=3)
    assert row["products"] == 31
    assert row["error"] == pytest.approx(((0 + 1 + 4) / 4 / 3) ** 0.5)
    assert row["error_largest"] == 1
    assert row["stated"] == 0.25


def test_failing_and_endless_estimators_are_rows(tiny: Problem) -> None:
    def failing(*_: Any) -> Answer:
        raise TypeError("unsupported operand type(s) for @")

    def endless(product: Any, *_: Any) -> Answer:
        while True:
            product(torch.ones(tiny.num_params, 1))

    truth = torch.tensor(1.0).double()
    failed = measure_estimator(tiny, truth, fake(failing), 30, seeds=1)
    assert failed["failure"] == "TypeError: unsupported operand type(s) for @"
    stopped = measure_estimator(tiny, truth, fake(endless), 30, seeds=1, limit=0.05)
    assert stopped["failure"].startswith("stopped after 0 s and ")
    assert "error" not in stopped


def test_distance_matches_eigenvalues_by_magnitude() -> None:
    truth = torch.tensor([-4.0, 2.0], dtype=torch.float64)
    assert distance(torch.tensor([2.0, 0.1, -4.0]), truth, "pairs") == 0
    assert distance(torch.tensor([4.0, 2.0]), truth, "pairs") == 2
    assert distance(torch.tensor([2.0]), truth, "pairs") == float("inf")
    assert distance(torch.tensor([-4.0, 4.0]), truth, "diagonal") == pytest.approx(2 / 20**0.5)


def test_to_one_per_cent(tiny: Problem) -> None:
    row = to_one_per_cent(tiny, dense_hessian(tiny).trace(), "auto", seeds=2)
    assert row["quantity"] == "trace to 1 %"
    assert row["error_largest"] < 0.05


def row(quantity: str, method: str, error: float, **fields: Any) -> dict[str, Any]:
    base = {"problem": "digits-mlp", "quantity": quantity, "method": method, "label": method, "ours": False}
    figures = {"budget": 30, "products": 30.0, "error": error, "seconds": 1.5, "seeds": 10, "failure": None}
    facts = {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "threads": 1, "clock": "process CPU time"}
    return {**base, **figures, **facts, **fields}


def test_table() -> None:
    rows = [
        row("trace", "ours-auto", 0.0124, ours=True, label="`trace`, auto"),
        row("trace", "curvlinops-xtrace", 1.96),
        row("trace", "skerch-hutch", 0.0, failure="TypeError: no"),
        row("pairs", "ours-eigsh", 0.001, products=22.0, ours=True, label="`eigsh`"),
        row("trace to 1 %", "ours-auto", 0.004, ours=True, label="`trace`, auto"),
    ]
    lines = estimator_table(rows).splitlines()
    assert lines[0] == "| trace of the Hessian | digits-mlp, 30 products |"
    assert lines[2] == "| **torch-curvature**, `trace`, auto | **1.2 %** (1.5 s) |"
    assert lines[3] == "| curvlinops-xtrace | 196 % (1.5 s) |"
    assert lines[4] == "| skerch-hutch | fails<sup>1</sup> |"
    assert "| **torch-curvature**, `eigsh` | **0.1 %** (1.5 s, 22 products) |" in lines
    assert "| digits-mlp, `trace`, auto | 30 | 0.4 % |" in lines
    assert "1. `TypeError: no`" in lines
    assert "10 for digits-mlp" in lines[-1]


def test_rows_are_in_the_order_of_the_methods() -> None:
    auto = [row("trace", "ours-auto", 0.1, budget=120), row("trace", "ours-auto", 0.1)]
    found = in_order([row("trace", "curvlinops-xtrace", 0.5), *auto])
    assert [(r["method"], r["budget"], r["error"]) for r in found] == [
        ("ours-auto", 30, 0.1),
        ("ours-auto", 120, 0.1),
        ("curvlinops-xtrace", 30, 0.5),
    ]


def test_budgets_suit_every_method() -> None:
    for budgets in bench_estimators.PRODUCTS.values():
        for budget in (*budgets, bench_estimators.WARM_UP):
            assert budget % 6 == 0  # thirds for Hutch++, halves for XTrace
            assert budget // 4 >= 5
