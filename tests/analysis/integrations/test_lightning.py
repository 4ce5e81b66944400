"""Lightning, run for real: automatic and manual optimization, its loggers and checkpoints."""

from __future__ import annotations

import csv
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import lightning_callback
from curvature import Objective
from curvature.errors import InputError
from optimizers import AdaHessian

NAMES = ("lightning.pytorch", "pytorch_lightning")
NAME = next((name for name in NAMES if importlib.util.find_spec(name.split(".")[0]) is not None), None)
if NAME is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)
pl: Any = importlib.import_module(NAME)
logging.getLogger(NAME).setLevel(logging.ERROR)

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, generator=G), torch.randn(24, 1, generator=G)


class Model(pl.LightningModule):  # type: ignore[misc, name-defined]  # made at run time
    def __init__(self, manual: bool = False, curvature: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))
        self.automatic_optimization = not manual
        self.curvature = curvature

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, _: int) -> Tensor | None:
        x, y = batch
        if self.automatic_optimization:
            return nn.functional.mse_loss(self(x), y)
        optimizer = self.optimizers()
        if self.curvature:
            loss: Tensor = optimizer.optimizer.step(lambda: nn.functional.mse_loss(self(x), y))
            return loss
        optimizer.zero_grad()
        value = nn.functional.mse_loss(self(x), y)
        self.manual_backward(value)
        optimizer.step()
        return value.detach()

    def configure_optimizers(self) -> Any:
        return (AdaHessian if self.curvature else torch.optim.Adam)(self.parameters(), lr=0.05)


def fit(model: Any, folder: Path, callbacks: Any = (), epochs: int = 1, path: Any = None, **settings: Any) -> Any:
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4, shuffle=True)
    trainer = (
        pl.Trainer(
            **{
                "max_epochs": epochs,
                "accelerator": "cpu",
                "callbacks": list(callbacks),
                "default_root_dir": str(folder),
            },
            **{"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "logger": False},
            **{"enable_checkpointing": False, **settings},
        )
        if "logger" not in settings
        else pl.Trainer(
            **{
                "max_epochs": epochs,
                "accelerator": "cpu",
                "callbacks": list(callbacks),
                "default_root_dir": str(folder),
            },
            **{"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
            **{"enable_checkpointing": False, **settings},
        )
    )
    trainer.fit(model, loader, ckpt_path=path)
    return trainer


def tracking(model: Any, **settings: Any) -> Any:
    objective = Objective(model, nn.MSELoss(), (X, Y))
    return lightning_callback(objective, **{"budget": None, "generator": 0, **settings})


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_training_is_not_disturbed(manual: bool, tmp_path: Path) -> None:
    plain, model = Model(manual), Model(manual)
    fit(plain, tmp_path)
    callback = tracking(model)
    fit(model, tmp_path, [callback])
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    record = callback.tracker.record
    assert (record.steps, record.optimizer) == (tuple(range(6)), "Adam")
    assert all(r.preconditioned > 0 and r.train_loss > 0 for r in record.readings)


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_loggers_and_checkpoints(tmp_path: Path) -> None:
    loggers = importlib.import_module(f"{NAME}.loggers")
    model = Model()
    callback = tracking(model)
    logger = loggers.CSVLogger(str(tmp_path), name="log")
    trainer = fit(model, tmp_path, [callback], accumulate_grad_batches=2, logger=logger)
    assert callback.tracker.record.steps == (0, 1, 2)
    logger.save()
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    shown = [float(row["curvature/sharpness"]) for row in rows if row.get("curvature/sharpness")]
    assert shown == pytest.approx([r.sharpness for r in callback.tracker.record.readings])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Model()
    resumed = tracking(again)
    fit(again, tmp_path, [resumed], epochs=2, path=tmp_path / "model.ckpt", accumulate_grad_batches=2)
    assert resumed.tracker.record.steps == tuple(range(6))
    assert resumed.tracker.record.readings[:3] == callback.tracker.record.readings


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_measures_curvature_takes_part_in_manual_optimization(tmp_path: Path) -> None:
    model = Model(manual=True, curvature=True)
    callback = tracking(model)
    fit(model, tmp_path, [callback])
    assert (callback.tracker.record.optimizer, callback.tracker.record.num_steps) == ("AdaHessian", 6)
    with pytest.raises(InputError, match="the trainer has 1"):
        fit(Model(), tmp_path, [tracking(model, optimizer=1)])
