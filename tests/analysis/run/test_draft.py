"""Unfinished runs: what they were begun with is known again, and nothing else is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from analysis.run.draft import Draft
from analysis.run.identity import batches_sha256, loss_sha256
from analysis.run.preparation import Request
from analysis.tasks import Task
from curvature.errors import InputError


def task(loss: Any = None, test_shift: int = 0, train_shift: int = 0, *, loader: bool = False) -> Task:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=g), torch.randint(0, 3, (20,), generator=g)
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=g))
        model.bias.zero_()
    train, test = ((x[:12], (y[:12] + train_shift) % 3), (x[12:], (y[12:] + test_shift) % 3))
    data: Any = train, test
    if loader:
        data = [DataLoader(TensorDataset(*part), batch_size=5, shuffle=True) for part in (train, test)]
    return Task(name="t", model=model, loss=loss or nn.CrossEntropyLoss(), train_data=data[0], test_data=data[1])


def begin(folder: Path, made: Task, **settings: Any) -> None:
    Draft(folder).begin(made, made.objective(), Request(task="t"), settings)


@pytest.mark.parametrize("loader", [False, True])
def test_another_loss_or_other_data_are_refused(tmp_path: Path, loader: bool) -> None:
    begin(tmp_path, task(loader=loader), loss="task")
    begin(tmp_path, task(loader=loader), loss="task")
    Draft(tmp_path).confirm("loss", 0.25)
    begin(tmp_path, task(loader=loader), loss="task")  # what was confirmed is no setting
    with pytest.raises(InputError, match="begun with another loss;"):
        begin(tmp_path, task(loader=loader), loss="squared")
    with pytest.raises(InputError, match="another loss of the task"):
        begin(tmp_path, task(nn.CrossEntropyLoss(label_smoothing=0.1), loader=loader), loss="task")
    with pytest.raises(InputError, match="another test data;"):
        begin(tmp_path, task(test_shift=1, loader=loader), loss="task")
    with pytest.raises(InputError, match="value of the loss" if loader else "another data;"):
        begin(tmp_path, task(train_shift=1, loader=loader), loss="task")
    with pytest.raises(InputError, match="another loss;"):
        Draft(tmp_path).confirm("loss", 0.5)


def test_another_device_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, task())
    (kept,) = tmp_path.rglob("settings.json")
    kept.write_text(kept.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(InputError, match="begun with another device;"):
        begin(tmp_path, task())


def scaled(factor: float) -> Any:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return factor * F.cross_entropy(outputs, labels)

    return loss


def test_losses_are_known_by_what_they_compute() -> None:
    losses = [
        *(nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(torch.ones(3)), None),
        *(nn.CrossEntropyLoss(2 * torch.ones(3)), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)),
        *(scaled(1.0), scaled(2.0), lambda o, t: F.mse_loss(o, t), lambda o, t: F.mse_loss(o, 2 * t)),
    ]
    assert len({loss_sha256(loss) for loss in losses}) == len(losses)
    assert loss_sha256(scaled(2.0)) == loss_sha256(scaled(2.0))
    assert loss_sha256(nn.MSELoss()) == loss_sha256(nn.MSELoss().eval())


def test_examples_are_known_in_any_order_and_iterators_are_left_alone() -> None:
    x, y = torch.randn(9, 2), torch.arange(9)
    loaders = [DataLoader(TensorDataset(x, labels), batch_size=4, shuffle=True) for labels in (y, y, y.flip(0))]
    a, b, c = (batches_sha256(loader) for loader in loaders)
    assert a == b != c
    walked = iter([(x, y)])
    assert batches_sha256(walked) is None
    assert len(list(walked)) == 1
