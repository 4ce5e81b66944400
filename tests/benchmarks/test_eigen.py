"""The eigenvalue benchmark: every product is counted, the reference is the spectrum, wrong answers are called so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import trained
from benchmarks.common.markdown import insert, markers
from benchmarks.common.problems import Problem
from benchmarks.eigen import harness as eigen_harness
from benchmarks.eigen import methods as eigen_methods
from benchmarks.eigen import reference as eigen_reference
from benchmarks.eigen.bench import compared, hopeless
from benchmarks.eigen.harness import measure_eigen
from benchmarks.eigen.methods import EIGEN_METHODS, EigenMethod, Found, Meter, OutOfTime
from benchmarks.eigen.report import eigen_table


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    recipe = trained.Recipe(
        make=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        data=lambda: (torch.linspace(-1, 1, 60).reshape(20, 3).sin(), torch.arange(20) % 2),
        batch=lambda data: data,
        steps=5,
        learning_rate=1e-2,
        batch_size=4,
    )
    monkeypatch.setitem(trained.RECIPES, "tiny", recipe)
    monkeypatch.setattr(trained, "CACHE", tmp_path)
    monkeypatch.setattr(eigen_reference, "K", 5)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("tiny")
def test_training_is_repeatable_and_kept(tmp_path: Path) -> None:
    first = trained.make_trained("tiny")
    assert (tmp_path / "tiny.pt").exists()
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    kept = trained.make_trained("tiny")
    (tmp_path / "tiny.pt").unlink()
    torch.manual_seed(5)
    again = trained.make_trained("tiny", dtype=torch.float64)
    for p, q, r in zip(first.params, kept.params, again.params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.double(), r)


@pytest.mark.parametrize(("name", "num_params"), [("resnet", 77_754), ("gpt", 162_368)])
def test_networks_are_of_the_stated_size(name: str, num_params: int) -> None:
    recipe = trained.RECIPES[name]
    data = recipe.data()
    inputs, targets = recipe.batch(data)
    model = recipe.make()
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert torch.isfinite(nn.functional.cross_entropy(model(inputs), targets))


@pytest.mark.usefixtures("tiny")
def test_reference_is_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = trained.make_trained("tiny", dtype=torch.float64)
    product = eigen_reference.plain_product(problem)
    H = torch.stack([product(e) for e in torch.eye(problem.num_params, dtype=torch.float64)])
    exact = torch.linalg.eigvalsh(H).flip(0)
    truth = eigen_reference.reference("tiny")
    torch.testing.assert_close(truth.eigenvalues("LA"), exact[:5], rtol=1e-7, atol=0)
    by_magnitude = exact[exact.abs().argsort(descending=True)]
    torch.testing.assert_close(truth.eigenvalues("LM")[:5], by_magnitude[:5], rtol=1e-3, atol=0)
    assert truth.difference < 1e-7
    monkeypatch.setattr(eigen_reference, "_compute", None)
    assert eigen_reference.reference("tiny") == truth  # kept


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["eigsh", "lobpcg", "ours-arpack", "ours-scipy-lobpcg"])
def test_row_of_a_right_method(method: str) -> None:
    row = measure_eigen("tiny", 2, method)
    assert row.failure is None
    assert row.right
    assert row.converged
    assert row.error is not None
    assert row.error < 1e-3
    assert row.residual is not None
    assert row.residual < 1.1e-3
    assert row.products is not None
    assert row.products >= 4
    assert row.seconds == pytest.approx(row.setup_seconds + row.solve_seconds)


@pytest.mark.usefixtures("tiny")
def test_our_count_is_that_of_the_meter() -> None:
    problem = trained.make_trained("tiny")
    meter = Meter()
    A = eigen_methods._our_hessian(problem, meter)
    from curvature.linalg import eigsh

    pairs = eigsh(A, 2, generator=torch.Generator().manual_seed(0), block_size=2)
    assert meter.products == pairs.num_matvecs
    assert sum(columns for columns, _ in meter.calls) == pairs.num_matvecs
    assert {columns for columns, _ in meter.calls} == {1, 2}  # single ones show that no pair was missed


def fake(name: str, make: Any, **options: Any) -> EigenMethod:
    return EigenMethod(name=name, label=name, make=make, load=lambda: None, **options)


def make_ghosts(problem: Problem, k: int, meter: Meter, expected: Tensor) -> Any:
    product = meter.watch(eigen_reference.plain_product(problem))

    def solve() -> Found:
        u = torch.zeros(problem.num_params)
        u[0] = 1
        product(u)
        return Found(expected[:1].repeat(k), u[:, None].repeat(1, k), True)

    return solve


def make_endless(problem: Problem, _k: int, meter: Meter, _expected: Tensor) -> Any:
    def solve() -> Found:
        product = meter.watch(eigen_reference.plain_product(problem))
        while True:
            product(torch.ones(problem.num_params))

    return solve


def make_failing(*_: Any) -> Any:
    raise RuntimeError("no such thing")


@pytest.mark.usefixtures("tiny")
def test_wrong_endless_and_failing_methods_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (fake("ghosts", make_ghosts), fake("endless", make_endless), fake("failing", make_failing)):
        monkeypatch.setitem(EIGEN_METHODS, method.name, method)
    ghosts = measure_eigen("tiny", 2, "ghosts")
    assert ghosts.right is False
    assert ghosts.converged is True
    assert ghosts.residual is not None
    assert ghosts.residual > 0.01
    endless = measure_eigen("tiny", 1, "endless", limit=0.05)
    assert endless.failure is not None
    assert endless.failure.startswith("stopped after 0 s and ")
    assert measure_eigen("tiny", 1, "failing").failure == "RuntimeError: no such thing"


def test_meter_counts_columns_and_stops() -> None:
    meter = Meter()
    product = meter.watch(lambda X: 2 * X)
    product(torch.ones(5))
    product(torch.ones(5, 3))
    assert meter.products == 4
    assert [columns for columns, _ in meter.calls] == [1, 3]
    with pytest.raises(OutOfTime):
        Meter(limit=0.0).watch(lambda X: X)(torch.ones(1))


def test_error_is_by_rank_and_by_magnitude() -> None:
    expected = torch.tensor([4.0, 2.0], dtype=torch.float64)
    assert eigen_harness._error(torch.tensor([2.0, 4.0]), expected) == 0
    assert eigen_harness._error(torch.tensor([4.0, 4.0]), expected) == 1
    assert eigen_harness._error(torch.tensor([4.0]), expected) == float("inf")
    signed = torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64)
    assert eigen_harness._error(torch.tensor([-3.0, 2.0, 4.0]), signed) == 0


def row(k: int, method: str, seconds: float, **fields: Any) -> dict[str, Any]:
    base = {"problem": "gpt", "num_params": 1234, "k": k, "method": method, "label": method, "products": 10}
    figures = {"seconds": seconds, "right": True, "converged": True, "error": 1e-6, "reference_difference": 1e-9}
    facts = {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "threads": 1, "clock": "process CPU time"}
    return {**base, **figures, **facts, **fields}


def test_table_shows_costs_and_what_was_said() -> None:
    rows = [
        row(1, "eigsh", 2.0, label="`eigsh`"),
        row(10, "eigsh", 4.0, label="`eigsh`"),
        row(1, "pyhessian", 1.0, right=False, converged=None, error=0.03),
        row(10, "pyhessian", 1.0, right=False, converged=True, error=0.5),
        {
            "problem": "gpt",
            "k": 1,
            "method": "het-power",
            "label": "power",
            "failure": "stopped after 9 s and 7 products",
        },
        {"problem": "gpt", "k": 10, "method": "het-power", "label": "power", "failure": "ValueError: no"},
    ]
    lines = eigen_table(rows).splitlines()
    assert lines[0] == "| gpt, 1k | top 1 | top 10 |"
    assert lines[2] == "| **torch-curvature**, `eigsh` | **2.0 s** (10) | **4.0 s** (10) |"
    wrong = "1.0 s (10), wrong by 3 %, does not say | 1.0 s (10), wrong by 50 %, claims to be right |"
    assert lines[3] == "| pyhessian | " + wrong
    assert lines[4] == "| power | stopped after 9 s and 7 products | fails<sup>1</sup> |"
    assert lines[6] == "1. `ValueError: no`"
    assert "agree to 1e-09" in lines[-1]


def test_rows_are_in_order_and_compared_with_ours() -> None:
    rows = compared([row(10, "curvlinops", 8.0), row(10, "eigsh", 4.0), row(1, "eigsh", 2.0)])
    assert [(r["k"], r["method"]) for r in rows] == [(1, "eigsh"), (10, "eigsh"), (10, "curvlinops")]
    assert rows[1]["seconds"] == 4.0
    assert rows[2]["times_ours"] == {"products": 1.0, "seconds": 2.0}


def test_power_iterations_without_hope_are_not_started() -> None:
    assert hopeless(50, None, 100) == ""
    assert hopeless(50, row(10, "het-power", 10.0), 100) == ""
    assert hopeless(50, row(10, "het-power", 30.0), 100) == "not run: top 10 took 30 s"
    stopped = {"k": 10, "failure": "stopped after 100 s and 7 products"}
    assert hopeless(50, stopped, 100) == "not run: top 10 stopped after 100 s and 7 products"
    assert hopeless(50, {"k": 10, "failure": "ValueError: no"}, 100) == ""


def test_each_table_has_its_own_place() -> None:
    products, eigen = ("\nold\n".join(markers(name)) for name in ("products", "eigen"))
    once = insert(f"{products}\n{eigen}", "new\n", "eigen")
    assert once.startswith(products)
    assert "new" in once
    with pytest.raises(ValueError, match="benchmark:eigen"):
        insert(products, "new\n", "eigen")
