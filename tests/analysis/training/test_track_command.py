"""`curvature track`: the training is a plain loop's, the model stays as it was, an interrupted run goes on alike."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from typer.testing import CliRunner

from analysis.cli import app
from analysis.registry import load_run
from analysis.run.draft import Draft
from analysis.show.drawing import Colors
from analysis.show.wording import sparkline
from analysis.tasks import load_task
from analysis.training import measure
from analysis.training.loop import TrainingPlan, batches_of
from analysis.training.measure import TrackPlan, track_training
from analysis.training.results import TrainingRecord
from analysis.training.study import TrackRun
from curvature import Objective
from curvature.errors import InputError

TASK = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return Task(name="toy", model=model, description="A toy.", loss=nn.CrossEntropyLoss(), train_data=(x, y))
"""


def pieces() -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor], Objective]:
    g = torch.Generator().manual_seed(0)
    data = (torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    return model, data, Objective(model, nn.CrossEntropyLoss(), data)


def test_it_trains_as_a_plain_loop_does_and_puts_the_model_back() -> None:
    model, data, objective = pieces()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = TrackPlan(lr=0.05, steps=12, optimizer="adam", beta2=0.9, weight_decay=0.01, every=3)
    record = track_training(objective, plan, generator=0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert (record.optimizer, record.num_steps, record.steps) == ("Adam", 12, (0, 3, 6, 9))
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05, betas=(0.9, 0.9), weight_decay=0.01)
    for step in range(12):
        loss = nn.functional.cross_entropy(twin(data[0]), data[1])
        if step in record.steps:
            reading = record.readings[step // 3]
            assert reading.train_loss == float(loss.detach())
            assert reading.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_epochs_are_permutations_and_data_in_several_batches_are_walked() -> None:
    _, data, objective = pieces()
    drawn = batches_of(objective, 16, 5, 0)
    epochs = [torch.cat([next(drawn)[0] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, data[0].sort(0).values)
    assert not torch.equal(*epochs)
    later = batches_of(objective, 16, 5, 4)
    assert torch.equal(next(later)[0], epochs[1][16:32])
    halves = [(data[0][:20], data[1][:20]), (data[0][20:], data[1][20:])]
    several = objective.replace(data=halves)
    walked = batches_of(several, None, 0, 3)
    assert torch.equal(next(walked)[0], data[0][20:])
    with pytest.raises(InputError, match="batch_size cuts data that are one batch"):
        track_training(several, lr=0.1, steps=2, batch_size=4, generator=0)


@pytest.mark.parametrize("quantities", [("sharpness", "preconditioned"), ("noise", "penalties", "layers", "trace")])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    quantities: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SAVED_EVERY", 0.0)
    plan = TrackPlan(lr=0.05, steps=9, batch_size=16, momentum=0.9, every=2, quantities=quantities, fresh=True)

    def run(draft: Draft | None, stop: int | None = None) -> TrainingRecord:
        def progress(stage: str, done: int, total: int) -> None:
            assert total == 9
            if done == 4:
                assert "loss" in stage.split("\n")[1]
            if done == stop:
                raise KeyboardInterrupt

        return track_training(pieces()[2], plan, generator=3, progress=progress, draft=draft)

    def rows(record: TrainingRecord) -> list[dict[str, Any]]:
        return [{**r.row(), "seconds": 0} for r in record.readings]

    tmp_path.joinpath("draft").mkdir()
    draft = Draft(tmp_path / "draft")
    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(draft, stop=6)
    draft.remove_if_empty()
    assert draft.exists
    again = run(draft)
    assert rows(again) == rows(whole)
    (tmp_path / "draft" / "state.pt").write_text("no state")
    with pytest.raises(InputError, match="begin again with --overwrite"):
        run(draft)


def test_a_run_that_diverges_ends_and_says_so() -> None:
    objective = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 1)))
    record = track_training(objective, lr=1e9, steps=100, quantities=("sharpness",), every=1, generator=0)
    assert record.num_steps < 20
    assert math.isnan(record.readings[-1].loss)


def test_the_command_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: f"<p>{figure.label}</p>")  # drawn below
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)
    (tmp_path / "toy.py").write_text(TASK)
    wanted = [f"--quantity={name}" for name in ("sharpness", "oscillation", "update", "critical", "layers")]
    arguments = ["track", "toy.py:task", "--lr=0.5", "--steps=30", "--momentum=0.5", "--every=3", *wanted]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    run = load_run(tmp_path / "runs" / "toy-track-1")
    assert isinstance(run, TrackRun)
    assert len(run.training.readings) == 10
    assert run.training.readings[4].threshold == pytest.approx(3 / 0.5)
    assert run.training.readings[-1].layers.keys() == {"0", "2"}
    page = (tmp_path / "runs" / "toy-track-1" / "report.html").read_text()
    text = " ".join(re.sub(r"<(style|svg|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    said = " ".join(done.stdout.split())
    for part in (
        "Is the learning rate stable? Yes: sharpness never reached its threshold",
        "Which layer is the sharpest?",
    ):
        assert part in said
        assert part in text
    figures = [figure for section in run.report().sections for figure in section.figures]
    assert [figure.name for figure in figures] == ["stability", "loss", "predictions", "layer-sharpness"]
    canvas = Figure()
    for ax, figure in zip(canvas.subplots(len(figures)), figures, strict=True):
        figure.draw(ax, Colors())
        labels = [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
        shown = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
        if figure.name == "stability":
            np.testing.assert_allclose(shown["sharpness / threshold"], run.training.series("stability").numpy())
            assert len(labels) == 2
        if figure.name == "layer-sharpness":
            assert labels == ["0", "2"]
            np.testing.assert_allclose(shown["2"], [r.layers["2"] for r in run.training.readings])
    canvas.draw_without_rendering()
    results = json.loads((tmp_path / "runs" / "toy-track-1" / "results.json").read_text())
    assert results["num_steps"] == 30
    second = TrackRun(**{**vars(run), "training": replace(run.training, readings=run.training.readings[:5])})
    second.save(tmp_path / "other")
    compared = CliRunner().invoke(app, ["compare", "runs/toy-track-1", "other"], env={"COLUMNS": "160"})
    assert compared.exit_code == 0, compared.output
    assert "share of steps above the threshold" in compared.stdout
    assert "2: sharpness" in compared.stdout
    bad = CliRunner().invoke(app, ["track", "toy.py:task", "--lr=0.5", "--quantity=sharp"])
    assert bad.exit_code == 2
    assert "got sharp" in bad.output


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quantities": ("penalties",)}, "penalties depend on the batch size"),
        ({"nesterov": True}, "momentum above 0"),
        ({"optimizer": "adam", "momentum": 0.9}, "adam has no momentum"),
        ({"optimizer": "lion"}, "must be one of sgd"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        TrackPlan(**{"lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.5}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("adamw", torch.optim.AdamW, {"beta1": 0.5}),
        ("sgd", torch.optim.SGD, {"momentum": 0.5, "nesterov": True}),
    ],
)
def test_every_optimizer_is_torchs(name: Any, kind: type, settings: dict[str, Any]) -> None:
    made = TrainingPlan(optimizer=name, **settings).make_optimizer([nn.Parameter(torch.ones(1))], 0.3)
    assert type(made) is kind
    group = made.param_groups[0]
    assert group["lr"] == 0.3
    assert group.get("momentum", 0.5) == 0.5 or name == "adagrad"
    assert group.get("betas", (0.5, 0.999)) == (0.5, 0.999)


def test_parameters_that_no_module_draws_cannot_be_fresh() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    objective = Objective(Own(), nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 1)))
    with pytest.raises(InputError, match="'Own' has no reset_parameters"):
        track_training(objective, lr=0.1, steps=1, fresh=True, generator=0)


def test_the_bundled_task_is_untrained_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (load_task("digits-tanh") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.objective().num_params == 8970
    assert float(first.objective().loss()) == float(second.objective().loss()) > 0.4
    assert first.checkpoint is None


def test_readings_as_a_table(tmp_path: Path) -> None:
    objective = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 1)))
    record = track_training(objective, lr=0.1, steps=3, quantities=("sharpness", "layers"), every=1, generator=0)
    lines = list(csv.DictReader(record.to_csv(tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(line["step"]) for line in lines] == [0, 1, 2]
    assert [float(line["sharpness"]) for line in lines] == record.series("sharpness").tolist()
    ((layer, value),) = record.readings[1].layers.items()
    assert float(lines[1][f"layers.{layer}"]) == value
    assert math.isnan(float(lines[0]["critical_sharpness"]))
    with pytest.raises(InputError, match="cannot write"):
        record.to_csv(tmp_path / "no" / "run.csv")


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, 2.0, math.nan, 7.0]) == "▁▂▃ █"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""
