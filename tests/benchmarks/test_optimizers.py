"""The benchmark of optimizers takes the same runs for all, reads them off honestly, and reports what fails."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.optimizers import bench as optimizer_bench
from benchmarks.optimizers import problems as optimizer_problems
from benchmarks.optimizers.bench import (
    check_row,
    cost_rows,
    memory_row,
    micro_row,
    new_row,
    next_rate,
    pilots,
    run,
    train_row,
)
from benchmarks.optimizers.curves import at_equal_steps, at_equal_time
from benchmarks.optimizers.first_order import FIRST_ORDER
from benchmarks.optimizers.methods import method_of
from benchmarks.optimizers.peers import METHODS, Method, take_step
from benchmarks.optimizers.problems import TrainingProblem, make_training
from benchmarks.optimizers.report import (
    check_page,
    cost_table,
    memory_sentence,
    micro_table,
    training_table,
    variant_table,
)
from benchmarks.optimizers.widths import width_rows


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> TrainingProblem:
        x = torch.linspace(-1, 1, 12)[:, None]
        model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def outputs(model: nn.Module, x: Tensor) -> Tensor:
            value: Tensor = model(x).flatten()
            return value

        return TrainingProblem("tiny", model, nn.MSELoss(), x, x**2, 6, 32, outputs, lambda _: 0.5)

    monkeypatch.setitem(optimizer_problems.TRAINING, "tiny", make)


def one(curve: list[tuple[int, float, float, float]], *, diverged: bool = False, lr: float = 1.0) -> dict[str, object]:
    return {"lr": lr, "seed": 0, "diverged": diverged, "steps": 10, "curve": curve}


def test_curves_are_read_at_equal_steps_and_at_equal_time() -> None:
    slow = one([(0, 0.0, 8.0, 0.1), (5, 9.0, 4.0, 0.2), (10, 18.0, 1.0, 0.9)])
    assert at_equal_steps(slow) == (1.0, 0.9)
    assert at_equal_time(slow) == (4.0, 0.2)
    failed = one([(0, 0.0, 8.0, 0.1)], diverged=True)
    assert at_equal_steps(failed)[0] == at_equal_time(failed)[0] == math.inf


def test_rates_have_neighbours() -> None:
    up = down = [0.1]
    for _ in range(4):
        up, down = [*up, next_rate(up[-1], up=True)], [*down, next_rate(down[-1], up=False)]
    assert up == [0.1, 0.3, 1.0, 3.0, 10.0]
    assert down == [0.1, 0.03, 0.01, 0.003, 0.001]


def test_rates_go_on_beyond_an_end_where_the_best_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_bench, "at_equal_time", at_equal_steps)  # clocks decide nothing here
    slow = replace(METHODS["adahessian"], rates=(1e-5, 3e-5))
    tried = [one["lr"] for one in pilots("tiny", slow, steps=4)]
    assert tried == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    wild = replace(METHODS["sgd"], rates=(1e6, 1e7))
    assert [one["lr"] for one in pilots("tiny", wild, steps=4)] == [1e4, 3e4, 1e5, 3e5, 1e6, 1e7]  # all diverge


def test_runs_are_reproducible_and_reduce_the_loss() -> None:
    first, again = (run("tiny", METHODS["adahessian"], 0.05, seed=0) for _ in range(2))
    losses = [[point[2] for point in found["curve"]] for found in (first, again)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert first["curve"][-1][0] == 32


def test_a_run_that_diverges_says_so() -> None:
    found = run("tiny", METHODS["sgd"], 1e6, seed=0)
    assert found["diverged"]
    assert all(math.isfinite(point[2]) for point in found["curve"])


def test_a_run_whose_curvature_is_not_finite_has_diverged() -> None:
    found = run("tiny", METHODS["adahessian"], 1e30, seed=0)
    assert found["diverged"]
    assert found["curve"][0][0] == 0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.label.startswith("torch")])
def test_every_form_of_step_moves_parameters(name: str) -> None:
    problem = make_training("tiny")
    before = [p.detach().clone() for p in problem.params]
    try:
        optimizer = METHODS[name].make(problem.params, 1e-3, problem.loss)
    except ImportError:
        pytest.skip("a peer that is not installed")
    take_step(METHODS[name], optimizer, problem, problem.batch(torch.Generator().manual_seed(0)))
    assert all(not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


def test_costs_and_training_have_tables() -> None:
    costs = cost_rows("tiny", ["adamw", "adahessian"], rounds=2, period=2)
    assert [row["failure"] for row in costs] == [None, None]
    assert "**torch-curvature AdaHessian**" in cost_table(costs)
    row = train_row("tiny", "adahessian", seeds=2, steps=16)
    assert [len(row["runs"]), row["runs"][1]["seed"]] == [2, 1]
    assert [one["seed"] for one in row["equal_steps"]["runs"]] == [0, 1]
    assert "**torch-curvature AdaHessian** (2 seeds) | " in training_table([row], "tiny")


def test_first_order_methods_and_those_without_backpropagation_have_rows() -> None:
    rows = cost_rows("tiny", [*FIRST_ORDER], rounds=1, period=2)
    assert {row["method"]: row["failure"] for row in rows if row["ours"] and row["failure"]} == {}
    assert "**torch-curvature LearnedOptimizer**" in cost_table(rows)


def test_widths_and_micro_batches_have_tables() -> None:
    rows = width_rows("tiny", ["muon", "soap-blocks", "official-soap"], new_row, rounds=2, period=2)
    assert all(row["adamw_steps"] > 0 for row in rows[:2])
    assert "| **torch-curvature SOAP, every 10th, sides above 1024 in blocks** |" in cost_table(rows, "width")
    row = micro_row("adamw", seeds=1)
    assert 0 < row["differences"][0] < 1e-4
    assert "| torch AdamW | " in micro_table([row, {**row, "failure": "not there"}])


def test_variants_take_steps_of_their_own_and_have_a_table() -> None:
    problem = make_training("tiny")
    batch = problem.batch(torch.Generator().manual_seed(0))
    limit = 0.1 * problem.gradient_norm(batch)
    method = method_of("clipped")
    take_step(method, method.make(problem.params, 1e-9, problem.loss), problem, batch, limit=limit)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in problem.params])) == pytest.approx(limit, rel=1e-4)
    part = method_of("quarter")
    optimizer = part.make(problem.params, 1e-9, problem.loss)
    take_step(part, optimizer, problem, batch)
    alone = method_of("adahessian").make(problem.params, 1e-9, problem.loss)
    alone.step(lambda: problem.loss_of((batch[0][::4], batch[1][::4])))  # type: ignore[arg-type,return-value]
    for p in problem.params:
        torch.testing.assert_close(
            optimizer.state[p]["exp_hessian_diag_sq"], alone.state[p]["exp_hessian_diag_sq"], rtol=1e-4, atol=1e-9
        )
    rows = [train_row("tiny", name, seeds=1, steps=4) for name in ("adahessian", "adahessian-10", "quarter")]
    rows += [train_row("tiny", name, seeds=1, steps=4) for name in ("adahessian-4-probes", "adamw")]
    assert [row["kind"] for row in rows] == ["training", "training", "variant", "training", "training"]
    assert "| AdaHessian, curvature of a quarter of the batch | " in variant_table(rows)


def test_methods_that_refresh_rarely_begin_densely_in_training_only() -> None:
    problem, method = make_training("tiny"), METHODS["adahessian-10"]
    made = [method.make(problem.params, 0.1, problem.loss, training=training) for training in (False, True)]
    assert [optimizer.param_groups[0]["update_first"] for optimizer in made] == [1, 20]


def test_memory_has_a_row_and_a_sentence() -> None:
    row = memory_row("adahessian", problem_name="tiny", steps=20)
    assert row["failure"] is None
    assert 0 <= row["grown_mebibytes"] < 1
    assert f"torch-curvature AdaHessian {row['grown_mebibytes']:.1f} MiB" in memory_sentence([row])


def test_failures_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> type[torch.optim.Optimizer]:
        raise ImportError("no such library")

    monkeypatch.setitem(METHODS, "missing", Method("a peer", missing, "backward", (0.1,)))
    rows = [*cost_rows("tiny", ["missing"], rounds=1, period=1), train_row("tiny", "missing", seeds=1)]
    assert {row["failure"] for row in rows} == {"ImportError: no such library"}
    assert "fails" in cost_table(rows)
    assert "fails: `ImportError" in training_table(rows, "tiny")


def test_checks_have_a_page() -> None:
    page = check_page([check_row("sgd", only="learning rate")])
    assert "| torch SGD, momentum 0.9 | 2 | 0 | 0 |" in page
