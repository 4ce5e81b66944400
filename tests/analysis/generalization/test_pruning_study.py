"""Pruning as a measurement and a command, and lottery tickets."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import analysis
from analysis.cli import app
from analysis.generalization.pruning.measure import _parted
from analysis.generalization.pruning.results import PruningPoint, PruningRecord, TicketRow, Tickets
from analysis.generalization.pruning.tickets import lottery_tickets
from curvature import Objective
from curvature.errors import InputError

TASK = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=g)
    y = (x @ torch.randn(5, 3, generator=g)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return Task(name="toy", model=model, description="A toy.", loss=nn.CrossEntropyLoss(), train_data=(x, y))
"""


def toy() -> tuple[Objective, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    y = (x @ torch.randn(5, 3, generator=g)).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return Objective(model, nn.CrossEntropyLoss(), (x[:80], y[:80])), (x[80:], y[80:])


def test_record_is_what_the_parts_say() -> None:
    objective, _ = toy()
    found = analysis.measure_pruning(
        objective, methods=("obd", "obs"), sparsities=(0.25, 0.5), held_out=0.0, generator=0
    )
    assert found.layers == {"0.weight": 40, "3.weight": 24}
    assert [p.num_pruned for p in found.of("obd", "all")] == [16, 32]
    scores = analysis.pruning_scores(objective, "obs")
    for layer, sparsity, point in (
        ("0.weight", 0.5, found.of("obs", "0.weight")[1]),
        ("all", 0.25, found.of("obs", "all")[0]),
    ):
        pruned = scores.pruned(sparsity, only=None if layer == "all" else layer)
        d, own = scores.removal(pruned)
        moved = copy.deepcopy(objective.model)
        start = 0
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(d[start : start + p.numel()].view(p.shape))
                start += p.numel()
        true = Objective(moved, nn.CrossEntropyLoss(), objective.settings["data"]).loss() - objective.loss()
        assert point.true == pytest.approx(float(true), rel=1e-3, abs=1e-6)
        assert point.own == pytest.approx(own, rel=1e-3)
        assert point.true_stderr > 0
        assert math.isnan(point.held_out)
    assert found.dampings["obs"] == pytest.approx(scores.damping, rel=1e-4)


def test_held_out_data_take_no_part_in_the_scores() -> None:
    objective, _ = toy()
    plan = {"methods": ("magnitude",), "sparsities": (0.5,), "generator": 0}
    found = analysis.measure_pruning(objective, held_out=0.25, **plan)  # type: ignore[arg-type]
    n, loss = 80, float(objective.loss())
    assert 0.75 * found.loss + 0.25 * found.held_out_loss == pytest.approx(loss, rel=1e-5)
    (point,) = found.of("magnitude", "all")
    (whole,) = analysis.measure_pruning(objective, held_out=0.0, **plan).of("magnitude", "all")  # type: ignore[arg-type]
    assert 0.75 * point.true + 0.25 * point.held_out == pytest.approx(whole.true, rel=1e-4)
    assert n == objective.total_weight
    batches = Objective(objective.model, nn.CrossEntropyLoss(), [objective.settings["data"]] * 4)
    (point,) = analysis.measure_pruning(batches, held_out=0.25, **plan).of("magnitude", "all")  # type: ignore[arg-type]
    assert point.held_out == pytest.approx(point.true, rel=1e-4)  # the same data again


def test_the_share_held_out_is_the_one_asked_for_and_sums_are_of_as_many_examples() -> None:
    objective, _ = toy()
    x, y = objective.settings["data"]
    plan = {"methods": ("magnitude",), "sparsities": (0.5,), "generator": 0}
    batches = objective.replace(data=list(zip(x.split(8), y.split(8), strict=True)))
    for share, count in ((0.1, 1), (0.2, 2), (0.3, 3), (0.7, 7), (0.9, 9)):
        ours, theirs = _parted(batches, share, torch.Generator().manual_seed(0))
        assert theirs is not None
        assert (len(ours.settings["data"]), len(theirs.settings["data"])) == (10 - count, count)
    mean, total = (
        analysis.measure_pruning(batches.replace(loss=nn.CrossEntropyLoss(reduction=reduction)), **plan)  # type: ignore[arg-type]
        for reduction in ("mean", "sum")
    )
    (one,), (summed,) = mean.of("magnitude", "all"), total.of("magnitude", "all")
    for name in ("true", "held_out", "held_out_stderr"):
        assert getattr(summed, name) == pytest.approx(64 * getattr(one, name), rel=1e-3)
    assert total.held_out_loss == pytest.approx(64 * mean.held_out_loss, rel=1e-4)
    assert "scaled" in total.notes[0]


def point(method: str, true: float, linear: float, layer: str = "a", **others: float) -> PruningPoint:
    known = {"sparsity": 0.5, "curvature": 0.0, "predicted_stderr": 0.1, "own": 1.0, "diagonal": 1.0, "size": 1.0}
    known |= {"true_stderr": 0.1, "held_out": 0.0, "held_out_stderr": 0.1, **others}
    return PruningPoint(method=method, layer=layer, num_pruned=1, linear=linear, true=true, **known)  # type: ignore[arg-type]


def test_rank_correlation_and_paired_differences() -> None:
    values = [(1.0, 1.0), (2.0, 4.0), (3.0, 2.0), (4.0, 8.0)]
    points = tuple(point("obd", true, linear, layer=f"l{i}") for i, (true, linear) in enumerate(values))
    points += (point("obd", -9.0, 9.0, sparsity=0.8), point("obd", -9.0, 9.0, layer="all"))
    record = PruningRecord(
        points=points, layers={}, loss=1.0, held_out_loss=1.0, num_params=4, dampings={}, tickets=None
    )
    assert record.rank_correlation("obd") == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(record.rank_correlation("obd", "own"))  # all the same
    assert record.rank_correlation("obd", most=0.8) < 0.5
    with pytest.raises(InputError, match="there are obd"):
        record.of("obs")
    rows = (
        TicketRow(kind="dense", sparsity=0.0, values=(0.9, 0.8, 0.7)),
        TicketRow(kind="ticket", sparsity=0.5, values=(0.92, 0.81, 0.73)),
    )
    d = Tickets(metric="accuracy", rows=rows, steps=1, rewind=0).difference("ticket", 0.5)
    assert (d.value, d.stderr, d.dof) == (pytest.approx(0.02), pytest.approx(0.01 / 3**0.5), 2)


def test_bad_trainings_are_refused() -> None:
    objective, held_out = toy()
    for settings, said in (
        ({"sparsities": (0.8, 0.5)}, "ascend"),
        ({"sparsities": (1.0,)}, "ascend"),
        ({"rewind": 500}, "rewind below steps"),
        ({"kinds": ("best",)}, "kinds"),
        ({"lr": 1e38, "steps": 20}, "diverged"),
    ):
        with pytest.raises(InputError, match=said):
            lottery_tickets(objective, held_out, num_seeds=1, generator=0, **settings)  # type: ignore[arg-type]
    for plan, said in (
        ({"methods": ("best",)}, "methods"),
        ({"sparsities": (0.0,)}, "sparsities"),
        ({"tickets": 1, "held_out": 0.0}, "held out"),
        ({"held_out": 0.001}, "no example"),
    ):
        with pytest.raises(InputError, match=said):
            analysis.measure_pruning(objective, generator=0, **plan)  # type: ignore[arg-type]


def test_rounds_of_a_plan_are_all_its_sparsities() -> None:
    objective, _ = toy()
    plan = {"methods": ("magnitude",), "sparsities": (0.3, 0.6), "tickets": 2, "steps": 15, "generator": 0}
    at_once, rounds = (analysis.measure_pruning(objective, iterative=way, **plan).tickets for way in (False, True))
    assert at_once is not None
    assert rounds is not None
    assert {row.sparsity for row in at_once.rows} == {0.0, 0.6}
    assert {row.sparsity for row in rounds.rows} == {0.0, 0.3, 0.6}


def test_command_report_and_stored_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    command = ["prune", "toy.py:task", "--sparsity", "0.6", "--tickets", "2", "--steps", "15"]
    result = CliRunner().invoke(app, [*command, "--batch-size", "16", "--out", "run"])
    assert result.exit_code == 0, result.output
    for words in ("Whose choice costs the least?", "Lottery tickets", "Predicted and true changes", "woodfisher"):
        assert words in result.output
    run = analysis.load_run("run")
    assert isinstance(run, analysis.PruningRun)
    assert run.pruning.methods == ("random", "magnitude", "obd", "woodfisher", "kfac", "obs", "obs-greedy")
    assert run.pruning.tickets is not None
    assert {row.sparsity for row in run.pruning.tickets.rows} == {0.0, 0.6}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") >= 4
    refused = CliRunner().invoke(app, ["prune", "toy.py:task", "--method", "best"])
    assert refused.exit_code == 2
