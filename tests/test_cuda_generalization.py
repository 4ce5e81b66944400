"""What only a GPU can show of trainings side by side: they are where the model is, with the numbers of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import analysis
from analysis.cli import app
from analysis.generalization.ensemble import Ensemble
from analysis.generalization.pruning import tickets
from curvature import Objective
from tests.checks import assert_close
from tests.test_cuda import nothing_changes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, at the first product of a thread
]


def _classifier(device: str) -> Objective:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 4, 4, generator=g, dtype=torch.float64)
    y = (x.flatten(1) @ torch.randn(16, 3, generator=g, dtype=torch.float64)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double().to(device)
    return Objective(model, nn.CrossEntropyLoss().to(device), (x, y))


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        ("descent", {"values": (2, 4, 8), "batch_size": 20}, ("train_loss", "test_loss", "sharpness", "condition")),
        ("descent", {"vary": "epochs", "values": (2, 5, 9)}, ("train_loss", "trace", "effective_dimension")),
        ("complexity", {"repeats": 3, "width": 6}, ("train_loss", "test_loss", "train_error")),
        ("labels", {"width": 6}, ("train_loss", "norm", "sharpness", "noise_trace")),
        ("regularize", {"width": 6, "dropout": 1e-9}, ("train_loss", "distance", "trace", "noise_scale")),
    ],
)
def test_networks_are_trained_where_the_model_is_with_the_numbers_of_the_cpu(
    kind: str, settings: dict[str, Any], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Ensemble.train

    def noted(ensemble: Ensemble, loss: Any, inputs: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> int:
        every = [*ensemble.params.values(), *ensemble.buffers.values(), inputs, labels]
        seen.extend(t.device.type for t in every)
        return real(ensemble, loss, inputs, labels, *args, **kwargs)

    monkeypatch.setattr(Ensemble, "train", noted)
    small = {"repeats": 2, "steps": 20, "processes": 1, **settings}
    with nothing_changes():
        there = analysis.measure(kind, _classifier("cuda"), generator=torch.Generator("cuda").manual_seed(3), **small)
    assert set(seen) == {"cuda"}
    assert there.device == "cuda:0"
    here = analysis.measure(kind, _classifier("cpu"), generator=torch.Generator().manual_seed(3), **small)
    assert set(seen) == {"cuda", "cpu"}
    (rows, expected) = (getattr(run, run.result).rows for run in (there, here))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name in names:
            assert getattr(row, name) == pytest.approx(getattr(other, name), rel=1e-4), (kind, name)


def test_pruning_and_tickets_are_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {
        "methods": ("magnitude", "obd", "kfac"),
        "sparsities": (0.3, 0.6),
        "held_out": 0.0,
        "generator": 0,
    }
    plain |= {"damping": 1e-2}  # under the usual one rounding moves K-FAC's losses by 2e-6, on CPUs too
    with nothing_changes():
        there = analysis.measure_pruning(_classifier("cuda"), **plain)
    here = analysis.measure_pruning(_classifier("cpu"), **plain)
    assert [p.num_pruned for p in there.points] == [p.num_pruned for p in here.points]
    for name in ("true", "predicted"):
        found, expected = (torch.tensor([getattr(p, name) for p in run.points]) for run in (there, here))
        assert_close(found, expected, 1e-6)
    seen = set[str]()
    real = tickets.take_step

    def noted(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
        seen.update(p.device.type for group in optimizer.param_groups for p in group["params"])
        return real(optimizer, loss)

    monkeypatch.setattr(tickets, "take_step", noted)
    with nothing_changes():
        found = [
            analysis.lottery_tickets(_classifier("cuda"), held.settings["data"], steps=20, num_seeds=2, generator=0)
            for held in (_classifier("cuda"), _classifier("cpu"))
        ]
    assert seen == {"cuda"}
    assert [row.values for row in found[0].rows] == [row.values for row in found[1].rows]
    assert len(found[0].rows) == 4


def test_the_command_trains_on_the_device_that_was_asked_for(tmp_path: Path) -> None:
    asked = ["labels", "digits-mlp", "--device", "cuda", "--repeats", "2", "--steps", "50", "--samples", "100"]
    done = CliRunner().invoke(app, [*asked, "--no-check", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert analysis.load_run(tmp_path / "run").device == "cuda:0"
    small = {"depths": (2,), "starts": 2, "steps": 100, "repeats": 2}
    bias = analysis.measure("bias", _classifier("cuda"), generator=0, check=False, **small)
    assert any("trained on the CPU" in note for note in bias.bias.notes)  # type: ignore[attr-defined]


def test_class_weights_go_where_the_model_goes(tmp_path: Path) -> None:
    (tmp_path / "weighted.py").write_text(
        "import torch\nfrom torch import nn\nfrom analysis.tasks import Task\n"
        "def task():\n"
        "    x = torch.randn(40, 3)\n"
        "    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))\n"
        "    return Task(name='w', model=nn.Linear(3, 2), loss=loss, train_data=(x, (x[:, 0] > 0).long()))\n"
    )
    asked = ["critical", f"{tmp_path / 'weighted.py'}:task", "--device", "cuda", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
