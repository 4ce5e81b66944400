"""What readings become in a CSV file, in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis import CurvatureTracker, csv_logger, tensorboard_logger, wandb_logger
from analysis.integrations.loggers import scalars
from analysis.training.results import TrainingReading
from curvature import Objective
from curvature.errors import InputError


def train(callback: Any, steps: int = 3) -> tuple[TrainingReading, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    data = (torch.randn(8, 3), torch.randn(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(
        Objective(model, nn.MSELoss(), data),
        optimizer,
        quantities=("sharpness", "layers", "preconditioned"),
        budget=None,
        callback=callback,
        generator=0,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        tracker.step()
    return tracker.record.readings


def test_scalars_are_what_was_measured() -> None:
    reading = TrainingReading(step=4, sharpness=2.0, layers={"a.b": 3.0, "c": math.inf}, critical_status="OK")
    assert scalars(reading) == {
        "curvature/interval": 0.0,
        "curvature/sharpness": 2.0,
        "curvature/layers/a.b": 3.0,
        "curvature/num_matvecs": 0.0,
        "curvature/num_losses": 0.0,
    }


def test_a_csv_file_grows_with_the_readings(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    readings = train(csv_logger(path))
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert [float(row["sharpness"]) for row in rows] == [r.sharpness for r in readings]
    assert [float(row["layers.2"]) for row in rows] == [r.layers["2"] for r in readings]
    with pytest.raises(InputError, match="exists; choose another file"):
        csv_logger(path)
    with pytest.raises(InputError, match="cannot write"):
        csv_logger(tmp_path / "no" / "run.csv")(readings[0])


def test_tensorboard_shows_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        readings = train(tensorboard_logger(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, values in (
        ("curvature/sharpness", [r.sharpness for r in readings]),
        ("curvature/layers/0", [r.layers["0"] for r in readings]),
    ):
        shown = events.Scalars(tag)
        assert [event.step for event in shown] == [0, 1, 2]
        assert [event.value for event in shown] == pytest.approx(values)
    with pytest.raises(InputError, match="must have add_scalar"):
        tensorboard_logger(str(tmp_path))


def test_weights_and_biases_gets_its_own_steps() -> None:
    class Run:
        def __init__(self) -> None:
            self.metrics: list[tuple[str, str]] = []
            self.logged: list[dict[str, float]] = []

        def define_metric(self, name: str, *, step_metric: str) -> None:
            self.metrics.append((name, step_metric))

        def log(self, data: dict[str, float]) -> None:
            self.logged.append(data)

    run = Run()
    readings = train(wandb_logger(run))
    assert run.metrics == [("curvature/*", "curvature/step")]
    assert [row["curvature/step"] for row in run.logged] == [0, 1, 2]
    assert [row["curvature/sharpness"] for row in run.logged] == [r.sharpness for r in readings]
    assert all(math.isfinite(value) for row in run.logged for value in row.values())
    with pytest.raises(InputError, match="must be what wandb"):
        wandb_logger(object())


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="curvature")
    readings = train(wandb_logger(run))
    assert run.summary["curvature/sharpness"] == pytest.approx(readings[-1].sharpness)
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))
    assert json.dumps(scalars(readings[0]))
