"""`transformers.Trainer`: a callback that tracks curvature, and this toolkit's optimizers in its loop."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.integrations.loggers import scalars
from analysis.training.tracker import CurvatureTracker
from curvature.errors import InputError
from curvature.objective.objective import Objective
from optimizers.diagonal.shell import CurvatureOptimizer
from optimizers.shared.differentiation import curvature_session

__all__ = ["accumulate_in", "hugging_face_callback"]

_STATE = "curvature_tracker.pt"


def hugging_face_callback(objective: Objective, **settings: Any) -> Any:
    """Return a `transformers.TrainerCallback` with a `CurvatureTracker` on the training.

    The tracker is `.tracker` from the start of the training on. Readings also go to the trainer's `log_history`, as
    "curvature/sharpness" and so on; checkpoints hold the tracker's state, and a resumed training goes on with it.

    Args:
        objective: on the trainer's model, with the probe that readings are taken on.
        **settings: of `CurvatureTracker`; `generator` at least.

    Raises:
        InputError: without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"transformers does not import ({error}); pip install 'transformers[torch]'.") from error

    base: Any = transformers.TrainerCallback

    class Tracking(base):  # its methods name only what they use
        tracker: CurvatureTracker

        def on_train_begin(self, args: Any, state: Any, _control: Any, optimizer: Any = None, **_: Any) -> None:
            self.tracker = CurvatureTracker(objective, _inner(optimizer), **settings)
            saved = _saved(args, state)
            if state.global_step > 0 and saved.is_file():
                self.tracker.load_state_dict(torch.load(saved, weights_only=True))

        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            reading = self.tracker.step()
            if reading is not None:
                state.log_history.append({**scalars(reading), "step": state.global_step + 1})

        def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            saved = _saved(args, state)
            if state.is_world_process_zero and saved.parent.is_dir():
                torch.save(self.tracker.state_dict(), saved)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.tracker.close()

    return Tracking()


def accumulate_in(trainer: Any) -> Any:
    """Let a `transformers.Trainer` train with an optimizer that measures curvature, and return it.

    `Trainer(..., optimizers=(AdaHessian(model.parameters(), lr=0.1), None))` calls `loss.backward()`, which leaves no
    graph for curvature; the optimizer then says so. After this call the trainer hands the loss to
    `optimizer.accumulate`, and computes it, where curvature is due, with attention that can be differentiated twice.
    Several batches a step, mixed precision and gradient clipping work as before.

    Args:
        trainer: with one of this toolkit's optimizers that measure curvature.

    Raises:
        InputError: for another optimizer, which needs none of this.

    Example:
        trainer = accumulate_in(Trainer(model=model, optimizers=(AdaHessian(model.parameters(), lr=0.1), None), ...))
        trainer.train()
    """
    if not isinstance(_inner(trainer.optimizer), CurvatureOptimizer):
        raise InputError(
            "the trainer must have an optimizer that measures curvature, by optimizers=(AdaHessian(...), None), got "
            f"{type(_inner(trainer.optimizer)).__name__}; others need no accumulate_in."
        )
    compute_loss, accelerator = trainer.compute_loss, trainer.accelerator

    def differentiable_twice(*args: Any, **others: Any) -> Any:
        due = _inner(trainer.optimizer).curvature_due and torch.is_grad_enabled()
        with curvature_session() if due else contextlib.nullcontext():
            return compute_loss(*args, **others)

    def backward(loss: Tensor, **_: Any) -> None:
        scaler = getattr(accelerator, "scaler", None)
        _inner(trainer.optimizer).accumulate(loss / accelerator.gradient_accumulation_steps, scaler=scaler)

    trainer.compute_loss, accelerator.backward = differentiable_twice, backward
    return trainer


def _inner(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _saved(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
