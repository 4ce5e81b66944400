"""Lightning: a callback that tracks curvature, under automatic and manual optimization."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from analysis.integrations.loggers import scalars
from analysis.training.tracker import CurvatureTracker
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["lightning_callback"]

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(objective: Objective, *, optimizer: int = 0, **settings: Any) -> Any:
    """Return a Lightning `Callback` with a `CurvatureTracker` on the training.

    The tracker is `.tracker` from the start of the training on. Readings also go to the trainer's loggers, as
    "curvature/sharpness" and so on; checkpoints hold the tracker's state, and a resumed training goes on with it. With
    manual optimization the readings are of the last step that the optimizer took in a batch.

    This toolkit's optimizers take part in manual optimization:
    `self.optimizers().optimizer.step(lambda: self.loss(batch))`.

    Args:
        objective: on the trained model (the LightningModule, or the network in it), with the probe of the readings.
        optimizer: which of the trainer's optimizers.
        **settings: of `CurvatureTracker`; `generator` at least.

    Raises:
        InputError: without Lightning, or, at the start of the training, with fewer optimizers.
    """
    pl = _lightning()

    class Tracking(pl.Callback):  # type: ignore[name-defined]  # made at run time
        tracker: CurvatureTracker
        _kept: Mapping[str, Any] | None = None

        def on_train_start(self, trainer: Any, _module: Any) -> None:
            if optimizer >= len(trainer.optimizers):
                raise InputError(f"optimizer is {optimizer}, and the trainer has {len(trainer.optimizers)}.")
            self.tracker = CurvatureTracker(objective, trainer.optimizers[optimizer], **settings)
            if self._kept is not None:
                self.tracker.load_state_dict(self._kept)

        def on_train_batch_end(self, trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            reading = self.tracker.step(loss if isinstance(loss, Tensor) else None)
            if reading is not None:
                for logger in trainer.loggers:
                    logger.log_metrics(scalars(reading), step=reading.step)

        def on_train_end(self, *_: Any) -> None:
            self.tracker.close()

        def state_dict(self) -> dict[str, Any]:
            return self.tracker.state_dict() if hasattr(self, "tracker") else {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._kept = state_dict or None

    return Tracking()


def _lightning() -> Any:
    """Return the Lightning that is in use: its two names do not take each other's callbacks."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InputError("Lightning does not import; pip install lightning.")
