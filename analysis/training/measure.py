"""A training run with a tracker on it: what `curvature track` does."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

from analysis.records.plan import Plan, from_plan, setting
from analysis.run.draft import STATE, Draft
from analysis.show.listener import Progress
from analysis.show.wording import number, sparkline
from analysis.training.edge import edge_of_stability
from analysis.training.quantities import QUANTITIES
from analysis.training.results import Phase, TrainingRecord
from analysis.training.tracker import CurvatureTracker
from curvature.arguments import checked_fields
from curvature.data.parts import num_examples, take
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["TrackPlan", "track_training"]

_READINGS, _SAVED_EVERY, _SHOWN = 100, 5.0, 40
_USUAL = ("sharpness", "preconditioned", "oscillation", "update", "critical")


@checked_fields
@dataclass(frozen=True, kw_only=True)
class TrackPlan(Plan):
    """How to train, and what to measure on the way."""

    lr: float = setting(text="Learning rate.", above=0)
    steps: int = setting(1000, "Steps of the optimizer.", least=1)
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = setting("sgd", "Optimizer, of torch.optim.")
    momentum: float = setting(0.0, "Momentum of sgd and rmsprop.", least=0, below=1)
    nesterov: bool = setting(False, "Nesterov's momentum, of sgd.")
    beta1: float = setting(0.9, "Of adam and adamw.", least=0, below=1)
    beta2: float = setting(0.999, "Of adam and adamw; of rmsprop its alpha.", least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay of the optimizer.", least=0)
    batch_size: int | None = setting(
        None, "Train on batches of so many examples. Default: the batches of the task as they are.", least=1
    )
    fresh: bool = setting(False, "Initialise the parameters anew, by the seed, and do not go on from where they are.")
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
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise InputError("Nesterov's momentum goes with sgd and a momentum above 0.")
        if self.momentum > 0 and self.optimizer not in ("sgd", "rmsprop"):
            raise InputError(f"{self.optimizer} has no momentum; its beta1 is --beta1.")

    def make_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, momentum=self.momentum, nesterov=self.nesterov, **common)
        if self.optimizer == "rmsprop":
            return torch.optim.RMSprop(params, alpha=self.beta2, momentum=self.momentum, **common)
        if self.optimizer == "adagrad":
            return torch.optim.Adagrad(params, **common)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(params, betas=(self.beta1, self.beta2), **common)

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
    with _put_back(objective.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if plan.fresh:
            _initialise(objective.model)
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
    optimizer = plan.make_optimizer(list(objective.space.tensors.values()))
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
    for step, batch in enumerate(_batches(objective, plan.batch_size, seed, begun), begun):
        if step == plan.steps:
            break
        optimizer.zero_grad()
        loss = _loss(objective, batch)
        loss.backward()
        optimizer.step()
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


def _batches(objective: Objective, size: int | None, seed: int, skip: int) -> Iterator[Any]:
    """Yield batches without end, those of an epoch in an order that follows from its number."""
    if size is None:
        while True:
            for batch in objective.batches():
                if skip > 0:
                    skip -= 1
                else:
                    yield batch
    whole = list(objective.batches())
    count = num_examples(whole[0])
    if len(whole) > 1 or count == 0:
        raise InputError("batch_size cuts data that are one batch of tensors; leave it out for data that are several.")
    per_epoch = -(-count // size)
    epoch, first = divmod(skip, per_epoch)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order.split(size)[first:]:
            yield take(whole[0], rows.tolist(), count)
        epoch, first = epoch + 1, 0


def _loss(objective: Objective, batch: Any) -> Tensor:
    """Return the loss of a batch as training has it."""
    model, forward, loss = objective.model, objective.settings["forward"], objective.settings["loss"]
    found: Any = (model(batch[0]), batch[1]) if forward is None else forward(model, batch)
    value: Tensor = found if loss is None else loss(*found)
    return value


def _initialise(model: nn.Module) -> None:
    """Draw all parameters anew, as their modules do.

    Raises:
        InputError: for a module that holds parameters and cannot draw them.
    """
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif module._parameters:
            raise InputError(
                f"the module {name or type(model).__name__!r} has no reset_parameters(); let the task's function "
                "return the model as it is to start, and leave --fresh out."
            )


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers, gradients and modes after a training."""
    before = copy.deepcopy(model.state_dict())
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            model.load_state_dict(before)
        for module, training in modes:
            module.training = training
        for p, gradient in gradients:
            p.grad = gradient


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
