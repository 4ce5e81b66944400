"""`curvature bias`: a task's data as linear models see them, and what the study says of their trainings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import analysis
from analysis.cli import app
from analysis.generalization.implicit_bias.data import linear_data
from analysis.show.drawing import Colors
from curvature import Objective
from curvature.errors import InputError

F64 = torch.float64
USUAL: dict[str, Any] = {"inputs": 64, "wanted": None, "teacher": 2, "rank": 2, "hidden": 0.3}
SMALL: dict[str, Any] = {"depths": (1, 2), "starts": 3, "steps": 2000, "repeats": 3}


def of(x: Tensor, y: Tensor) -> Objective:
    if y.is_floating_point() or y.is_complex():
        return Objective(nn.Linear(x.shape[-1], y[0].numel()), nn.MSELoss(), (x, y))
    return Objective(nn.Linear(x.shape[-1], max(2, int(y.max()) + 1)), nn.CrossEntropyLoss(), (x, y))


def classes(d: int = 12) -> Objective:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, d, generator=g) @ torch.diag(torch.linspace(1, 3, d))
    return of(x, (x @ torch.randn(d, 4, generator=g)).argmax(1))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes the most time of a page."""
    monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: figure.label)
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)


@pytest.fixture(scope="module")
def run() -> analysis.ImplicitBiasRun:
    found = analysis.measure("bias", classes(), generator=0, check=False, **SMALL)
    assert isinstance(found, analysis.ImplicitBiasRun)
    return found


def test_data_are_those_of_the_task() -> None:
    objective = classes()
    x, y = (
        objective.settings["data"] if isinstance(objective.settings["data"], tuple) else objective.settings["data"][0]
    )
    data = linear_data(objective, 3, **USUAL)
    x, Y = x.double(), nn.functional.one_hot(y).double()
    z, Y = (x - x.mean(0)) / x.std(0, correction=0), Y - Y.mean(0)
    explained = Y.T @ z @ torch.linalg.inv(z.T @ z) @ z.T @ Y  # by least squares
    values = torch.linalg.eigvalsh(explained).flip(0).clamp_min(0).sqrt()
    torch.testing.assert_close(torch.linalg.svdvals(data.correlation), values / values[0], atol=1e-7, rtol=1e-7)
    assert data.X.shape == (6, 12)
    assert all(bool((z - row).abs().sum(1).lt(1e-9).any()) for row in data.X)
    assert sorted(data.teacher.tolist()) == [0.0] * 10 + [1.0] * 2
    s = torch.linalg.svdvals(data.matrix)
    assert (round(float(s[0]), 12), int((s > 1e-12).sum())) == (1.0, 2)
    assert int((~data.observed).sum()) == round(0.3 * data.observed.numel())
    again, other = linear_data(objective, 3, **USUAL), linear_data(objective, 4, **USUAL)
    assert torch.equal(again.X, data.X)
    assert not torch.equal(other.X, data.X)


def test_inputs_that_do_not_vary_and_examples_that_depend_on_others_are_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    few = torch.randn(5, 12, generator=g)
    x = few.repeat(20, 1)
    x[:, 3] = 7.0
    data = linear_data(of(x, x[:, :1]), 0, **USUAL | {"wanted": 8})
    assert data.X.shape == (4, 11)  # of five different examples less their mean
    assert int(torch.linalg.matrix_rank(data.X)) == 4
    assert any("11 of 12 inputs" in note for note in data.notes)
    assert any("4 examples were taken of the 8 wanted" in note for note in data.notes)
    wide = linear_data(of(torch.randn(30, 100, generator=g), torch.randn(30, generator=g)), 0, **USUAL)
    assert wide.X.shape[1] == 64


def test_all_trainings_are_what_their_theorems_say(run: analysis.ImplicitBiasRun) -> None:
    found = run.bias
    assert [r.depth for r in found.deep] == [r.depth for r in found.completed] == [1, 2]
    assert max(r.deviation for r in found.deep) < 0.01
    assert max(r.rate_deviation for r in (*found.deep, *found.completed)) < 0.02
    assert max(r.distance(r.expected) for r in found.diagonal) < 1e-4
    assert found.diagonal[-1].distance(found.diagonal[-1].least_l2) < 1e-3
    hidden = [float(r.hidden_error[-1]) for r in found.completed]
    assert hidden[0] > 0.95
    assert max(hidden[1:]) < 0.3
    assert all(math.isnan(float(r.hidden_error[-1])) for r in found.deep)
    off = found.noise_deviation()
    assert len(found.noisy) == 3
    assert abs(off.value) < 0.15
    assert float(found.noisy[0].start_trace) > found.last_trace().value > found.noisy[0].least_trace * 0.9
    assert found.summary()["deep"] == max(r.deviation for r in found.deep)


def test_rates_are_those_of_the_singular_values_over_time() -> None:
    g = torch.Generator().manual_seed(1)
    S, seen = torch.randn(5, 4, generator=g, dtype=F64), torch.rand(5, 4, generator=g) < 0.7
    r = analysis.train_deep_linear(S, observed=seen, aligned=False, scale=0.1, time=2.0, num_points=400, generator=0)
    slope = (r.singular_values[2:] - r.singular_values[:-2]) / (r.times[2:] - r.times[:-2])[:, None]
    off = (r.rates[1:-1] - slope).abs()[5:].max() / slope.abs().max()
    assert off < 0.03
    gap = (r.product - S)[~seen].norm() / S[~seen].norm()
    torch.testing.assert_close(r.hidden_error[-1], gap)


@pytest.mark.usefixtures("undrawn")
def test_report_says_what_was_found(run: analysis.ImplicitBiasRun, tmp_path: Path) -> None:
    report = run.report()
    told = {finding.question: finding.answer for finding in report.findings}
    assert len(told) == 4
    assert "1 layer at the same time, 2 layers" in told["Does depth learn one direction after the other?"]
    assert "One layer leaves them as they began" in told["Does depth find low rank?"]
    assert "6 examples for 12 weights" in told["Sparse or smooth: what does the size of the start decide?"]
    assert re.search(r"tr H falls from .* over seeds", told["Does label noise lead to a flat solution?"])
    figures = [figure for section in report.sections for figure in section.figures]
    assert [figure.name for figure in figures] == ["bias-depth", "bias-completion", "bias-start", "bias-noise"]
    for figure in figures:
        drawn, axes = plt.subplots(1, figure.panels)
        figure.draw(axes, Colors())
        assert all(ax.lines for ax in drawn.axes)
        plt.close(drawn)
    run.save(tmp_path / "run")
    again = analysis.load_run(tmp_path / "run")
    assert isinstance(again, analysis.ImplicitBiasRun)
    assert torch.equal(again.bias.noisy[1].trace, run.bias.noisy[1].trace)


def test_a_single_depth_and_data_that_leave_no_room_for_noise() -> None:
    x = torch.eye(2).repeat(6, 1)  # two inputs, one the negative of the other: targets of any sign
    found = analysis.implicit_bias(of(x, x[:, :1]), depths=(2,), starts=2, steps=100, repeats=2, generator=0)
    assert len(found.diagonal[0].solution) == 2
    run = analysis.measure(
        "bias", of(x, x[:, :1]), generator=0, check=False, depths=(2,), starts=2, steps=100, repeats=2
    )
    assert len(run.report().findings) == (4 if found.noisy else 3)


def test_noise_that_no_rate_stands_is_left_out_and_said() -> None:
    found = analysis.implicit_bias(classes(), depths=(1,), starts=2, steps=100, repeats=2, noise=50.0, generator=0)
    assert found.noisy == ()
    assert any("Label noise was left out: SGD diverged" in note for note in found.notes)
    assert math.isnan(found.noise_deviation().value)


@pytest.mark.usefixtures("undrawn")
def test_the_command(tmp_path: Path) -> None:
    asked = [
        "bias",
        "mnist1d-mlp",
        "--depth",
        "2",
        "--inputs",
        "9",
        "--starts",
        "2",
        "--steps",
        "200",
        "--repeats",
        "2",
        "--no-check",
    ]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").is_file()
    refused = CliRunner().invoke(app, ["bias", "text-gpt", "--no-check", "--out", str(tmp_path / "other")])
    assert refused.exit_code != 0
    assert "Token numbers" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(9, 3), torch.arange(9), "at least two inputs must vary"),
        (torch.randn(1, 3), torch.randn(1), "at least two inputs must vary"),
        (torch.randn(9, 3), torch.ones(9), "targets do not vary"),
        (torch.randn(9, 3), torch.zeros(9, dtype=torch.int64), "targets do not vary"),
        (torch.full((9, 3), math.nan), torch.randn(9), "finite"),
        (torch.randn(9, 3), torch.tensor([math.inf] + 8 * [0.0]), "finite"),
        (torch.arange(27).reshape(9, 3), torch.arange(9), "floating-point"),
        (torch.randn(9), torch.randn(9), "floating-point"),
        (torch.randn(9, 3), torch.randn(9, dtype=torch.complex64), "complex"),
        (torch.randn(9, 3), torch.randn(8), "a label for each example"),
    ],
)
def test_data_that_no_linear_model_takes_are_refused(x: Tensor, y: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        linear_data(of(x, y), 0, **USUAL)


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": ()},
        {"depths": (2, 2)},
        {"depths": (0,)},
        {"smallest": 1.0, "largest": 0.5},
        {"hidden": 1.0},
        {"scale": 0.2},
        {"steps": 10},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        analysis.ImplicitBiasPlan(**settings)
