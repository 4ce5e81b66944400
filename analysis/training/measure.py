"""A training run with a tracker on it: what `curvature track` does."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from analysis.records.plan import from_plan, setting
from analysis.run.draft import STATE, Draft
from analysis.show.listener import Progress
from analysis.show.wording import number, sparkline
from analysis.training.edge import edge_of_stability
from analysis.training.loop import TrainingPlan, batches_of, initialise, put_back, take_step, training_loss
from analysis.training.quantities import QUANTITIES
from analysis.training.results import Phase, TrainingRecord
from analysis.training.tracker import CurvatureTracker
from curvature.arguments import checked_fields
from curvature.data.random_states import random_states_kept
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["TrackPlan", "track_training"]

_READINGS, _SAVED_EVERY, _SHOWN = 100, 5.0, 40
_USUAL = ("sharpness", "preconditioned", "oscillation", "update", "critical")


@checked_fields
@dataclass(frozen=True, kw_only=True)
class TrackPlan(TrainingPlan):
    """How to train, and what to measure on the way."""

    lr: float = setting(text="Learning rate.", above=0)
    steps: int = setting(1000, "Steps of the optimizer.", least=1)
    quantities: tuple[str, ...] = setting(
        _USUAL, f"What to measure; may be given several times: {', '.join(QUANTITIES)}.", flag="--quantity NAME"
    )
    every: int | None = setting(None, "Steps between readings. Default: a hundredth of all.", least=1)
    budget: float | None = setting(
        None, "Largest share of the training's time for readings. Default: as much as it takes.", above=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.quantities) - QUANTITIES.keys()):
            raise InputError(f"quantities must be among {', '.join(QUANTITIES)}, got {', '.join(unknown)}.")
        if "penalties" in self.quantities and self.batch_size is None:
            raise InputError("penalties depend on the batch size of the training; give it.")

    def spacing(self) -> int:
        """Return the steps between readings."""
        return max(1, self.steps // _READINGS) if self.every is None else self.every


@from_plan(TrackPlan)
def track_training(
    objective: Objective,
    plan: TrackPlan,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> TrainingRecord:
    """Train the objective's parameters with a tracker on them, and put the model back as it was.

    All data are the probe. The model trains in train mode; batches of `batch_size` are drawn without replacement, a
    last one that is short among them. A loss that is not finite ends the run.

    Cost: `steps` gradients of a batch, and for each reading what `QUANTITIES` says.

    Args:
        objective: of one batch in memory, where `batch_size` cuts it.
        plan: settings; or pass them one by one.
        generator: source of random numbers, on the objective's device, or a seed.
        progress: told after each step; lines after the first are the readings so far, as they are shown live.
        draft: where the state is kept from which an interrupted run goes on.

    Raises:
        InputError: for settings out of range, data that cannot be cut, or several ranks.
        CurvatureError: whatever stands in the way of a measurement.
    """
    if objective.process_group is not None:
        raise InputError(
            "this trains in one process; put a CurvatureTracker into your own loop, whose ranks average gradients."
        )
    seed = generator.initial_seed() % 2**62
    with put_back(objective.model), random_states_kept():
        torch.manual_seed(seed)
        if plan.fresh:
            initialise(objective.model)
        objective.model.train()
        return _train(objective, plan, generator, seed, progress, draft)


def _train(
    objective: Objective,
    plan: TrackPlan,
    generator: torch.Generator,
    seed: int,
    progress: Progress | None,
    draft: Draft | None,
) -> TrainingRecord:
    optimizer = plan.make_optimizer(list(objective.space.tensors.values()), plan.lr)
    tracker = CurvatureTracker(
        objective,
        optimizer,
        quantities=plan.quantities,
        every=plan.spacing(),
        budget=plan.budget,
        batch_size=plan.batch_size,
        generator=generator,
    )
    saved = _Saved(draft, objective.model, optimizer, tracker)
    begun, below = saved.load(), ""
    for step, batch in enumerate(batches_of(objective, plan.batch_size, seed, begun), begun):
        if step == plan.steps:
            break
        loss = take_step(optimizer, partial(training_loss, objective, batch))
        if tracker.step(loss) is not None:
            below = _shown(tracker.record)
            saved.save(step + 1)
            if not torch.isfinite(loss):
                break
        if progress is not None:
            progress(f"training\n{below}", step + 1, plan.steps)
    record = tracker.record
    tracker.close()
    objective.release()
    return record


class _Saved:
    """The state of a run that may be interrupted, on the disk every few seconds."""

    def __init__(
        self, draft: Draft | None, model: nn.Module, optimizer: torch.optim.Optimizer, tracker: CurvatureTracker
    ) -> None:
        self._path: Path | None = None if draft is None else draft.path / STATE
        self._model, self._optimizer, self._tracker = model, optimizer, tracker
        self._last = time.monotonic()

    def load(self) -> int:
        """Go on from what there is, and return the steps that were taken."""
        if self._path is None or not self._path.is_file():
            return 0
        try:
            state = torch.load(self._path, weights_only=True)
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._tracker.load_state_dict(state["tracker"])
            torch.set_rng_state(state["random"])
            return int(state["steps"])
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, EOFError, UnpicklingError) as error:
            said = type(error).__name__
            raise InputError(f"{self._path} cannot be read ({said}); begin again with --overwrite.") from error

    def save(self, steps: int) -> None:
        if self._path is None or time.monotonic() - self._last < _SAVED_EVERY:
            return
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "steps": steps}
        state |= {"tracker": self._tracker.state_dict(), "random": torch.get_rng_state()}
        half = self._path.with_name(f".{self._path.name}")
        with contextlib.suppress(OSError):  # it cannot be continued; nothing else depends on it
            torch.save(state, half)
            half.replace(self._path)
        self._last = time.monotonic()


def _shown(record: TrainingRecord) -> str:
    """Return the latest readings in a few lines, for the terminal."""
    last, phase = record.readings[-1], edge_of_stability(record).phases[-1]
    lines = [("loss", "loss", ""), ("sharpness", "sharpness", "")]
    if phase is not Phase.UNKNOWN:
        lines.append(("stability", "over threshold", phase.name.lower()))
    lines.append(("critical_sharpness", "critical", last.critical_status.lower().replace("_", " ")))
    found = []
    for name, label, more in lines:
        values = record.series(name).tolist()[-_SHOWN:]
        if any(value == value for value in values):
            found.append(f"{label:15}{sparkline(values)} {number(values[-1], 3)} {more}".rstrip())
    return "\n".join(found)
