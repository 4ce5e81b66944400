"""Curvature along a training run, measured as it goes, without its noticing and within a budget of its time.

References: Cohen et al. (2021) and Cohen et al. (2022), on the edge of stability; each further quantity names its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.training.budget import Budget
from analysis.training.highest import HighestLoss
from analysis.training.quantities import NEED_STEP, QUANTITIES, Measurer, StepTaken, refuse_penalties
from analysis.training.results import TrainingReading, TrainingRecord
from analysis.training.rows import Rows
from analysis.training.untouched import untouched
from curvature.arguments import checked
from curvature.environment.device import synchronize
from curvature.errors import InputError, NonFiniteError
from curvature.generators import AnyGenerator, as_generator
from curvature.objective.objective import Objective
from curvature.operators.preconditioned import optimizer_divisor, stability_limit

__all__ = ["CurvatureTracker"]


class CurvatureTracker:
    """Takes readings of curvature along a training loop, with any optimizer of torch.

    A reading belongs to one step u of the optimizer and to the parameters before it. Eigenvalues are followed from
    where they were at the reading before, and come with their residuals. Training is not disturbed: the run ends in the
    same bits as without.

    Readings are taken as often as `every` says, and no more often than `budget` allows: one is put off until all that
    the tracker does, hooks and the slower steps right after readings among it, takes no more than nine tenths of that
    share of the time of training (on a CPU the process's CPU time); the tenth is for what cannot be timed. The first is
    taken at once, so that a run shorter than its seconds over `budget` grows by more. On small models, whose steps take
    as long as a few calls of Python, that is every 50 to 150 steps, and the hooks take about 5 µs of each step, which
    count up to half of the budget. `record.notes` and the repr say what became of it.

    Args:
        objective: on the model that is trained. Its data are the probe that all readings are taken on, e.g. a fixed
            part of the training set; `step(batch=)` takes one on a batch of the training instead. A reading holds the
            graphs of all of them at once, about 3 times the memory of their gradient, unless `keep_graphs=False`.
            Where it has some of the parameters only, the others are as they are after the step.
        optimizer: whose steps are read, from its hooks. Without it a reading is of the parameters at the call.
        quantities: names in `QUANTITIES`. Default: the sharpness, and the preconditioned one if the optimizer's
            preconditioner can be read.
        every: fewest steps between two readings.
        budget: largest share of the training's time; None takes all that `every` asks for.
        folder: where rows are appended as they are found, to `training.jsonl`; the first rank alone writes.
        relative_to: other losses of the same model, by name, whose critical sharpness along the steps is measured with
            "critical": what the training does to what was learned before.
        batch_size: of the training, in examples; needed for "penalties".
        evaluation_mode: measure with dropout off and batch normalisation by its running statistics. Default: in the
            modes the model has, with the probe's own statistics and masks that stay the same.
        callback: called with each reading.
        generator: source of random numbers, on the objective's device, or a seed.

    Raises:
        InputError: for unknown quantities, those that need an optimizer without one, one that the optimizer does not
            allow, a model in parts on several ranks, or a folder that is a file.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tracker = CurvatureTracker(Objective(model, nn.MSELoss(), data), optimizer, budget=None, generator=0)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(data[0]), data[1])
        ...     loss.backward()
        ...     optimizer.step()
        ...     reading = tracker.step(loss)
        >>> [round(r.sharpness, 3) for r in tracker.record.readings], reading.threshold
        ([1.0, 1.0, 1.0], 20.0)
    """

    @checked
    def __init__(
        self,
        objective: Objective,
        optimizer: Any = None,
        *,
        quantities: Sequence[str] | None = None,
        every: int = 1,
        budget: float | None = 0.1,
        folder: Path | str | None = None,
        relative_to: Mapping[str, Objective] | None = None,
        batch_size: int | None = None,
        evaluation_mode: bool = False,
        callback: Callable[[TrainingReading], object] | None = None,
        generator: AnyGenerator,
    ) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.every = every
        self.evaluation_mode, self.batch_size = evaluation_mode, batch_size
        self._callback = callback
        self._known = optimizer is not None and _reads(optimizer)
        wanted = _wanted(quantities, optimizer, self._known, batch_size)
        if every < 1 or (budget is not None and not 0 < budget <= 1):
            raise InputError(f"every must be at least 1 and budget a share in (0, 1] or None, got {every}, {budget}.")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        if relative_to and "critical" not in wanted:
            raise InputError("relative_to goes with the quantity 'critical'; add it to quantities.")
        for name, other in (relative_to or {}).items():
            if other.model is not objective.model or other.space.names != objective.space.names:
                raise InputError(f"relative_to[{name!r}] is not a loss of the same parameters of the same model.")
        if any(given.shards is not None for given in (objective, *(relative_to or {}).values())):
            raise InputError(
                "the tracker does not follow models whose parameters lie in parts on several ranks; call "
                "eigsh(objective, 1) between steps."
            )
        self._generator = as_generator(generator, objective.device)
        self._measurer = Measurer(objective, wanted, relative_to or {}, batch_size, self._generator)
        self._readings: list[TrainingReading] = []
        self._rows = Rows(folder, objective) if folder is not None else None
        self._steps, self._next = 0, 0
        self._budget = Budget(budget, objective.device)
        self._highest = HighestLoss()
        self._open: tuple[Tensor, float, float] | None = None
        self._taken: StepTaken | None = None
        self._hooks: list[Any] = []
        if optimizer is not None:
            if not hasattr(optimizer, "register_step_pre_hook"):
                raise InputError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def record(self) -> TrainingRecord:
        """All readings so far."""
        return TrainingRecord(
            readings=tuple(self._readings),
            num_steps=self._steps,
            optimizer="" if self.optimizer is None else type(self.optimizer).__name__,
            batch_size=self.batch_size,
            num_params=self.objective.num_params,
            notes=self._notes(),
        )

    @property
    def interval(self) -> int:
        """Steps between the two latest readings; `every` before there are two."""
        return self._readings[-1].interval if len(self._readings) > 1 else self.every

    @property
    def age(self) -> int | None:
        """Steps that were taken since the parameters of the latest reading; None before the first."""
        return self._steps - self._readings[-1].step if self._readings else None

    @property
    def budget(self) -> float | None:
        """Largest share of the training's time."""
        return self._budget.share

    def __repr__(self) -> str:
        training, readings, hooks = self._budget.times()
        share = f", {100 * (readings + hooks) / training:.1f} % of its time" if training > 0 else ""
        return f"CurvatureTracker({len(self._readings)} readings of {self._steps} steps{share})"

    def _notes(self) -> tuple[str, ...]:
        if len(self._readings) < 2 or self.interval <= self.every or self.budget is None:
            return ()
        each, step = self._budget.expected, self._budget.times()[0] / max(self._steps, 1)
        return (
            f"Readings are {self.interval} steps apart where every={self.every} was asked for: one takes "
            f"{1000 * each:.3g} ms, a step of training {1000 * step:.3g} ms, the budget is {100 * self.budget:g} %.",
        )

    # -- the loop -----------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None, *, batch: Any = None) -> TrainingReading | None:
        """Take a reading if one is due; to be called once in each round of the loop, after the optimizer's step.

        Rounds without a step of the optimizer (accumulated gradients, one that a gradient scaler skipped) count as
        none; a step that a fused optimizer skips by itself is not read. A loss that is not finite gives a reading that
        says so, and training goes on.

        Args:
            loss: training loss of this round; read only when there is a reading, so that no GPU waits for it.
            batch: measure on this batch, as the objective's data have them, and not on the probe.

        Returns:
            The reading; None if none was due.

        Raises:
            InputError: for a loss that is no number.
            CurvatureError: whatever stands in the way of a measurement.
        """
        begun = self._budget.begin_round()
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise InputError(f"loss must be a number or a tensor with one entry, got shape {tuple(loss.shape)}.")
        if loss is not None:
            self._highest.note(loss)
        step, self._taken = self._taken, None
        if self.optimizer is None:
            due, self._steps = self._due(), self._steps + 1
        else:
            due = step is not None
        if not due:
            self._budget.end_round(begun)
            return None
        synchronize(self.objective.device)
        begun = self._budget.begin()
        reading = self._read(step, None if batch is None else [batch], loss)
        self._readings.append(reading)
        self._next = reading.step + self.every
        if self._rows is not None:
            self._rows.add(reading, self._readings)
        self._budget.end(begun)
        if self._callback is not None:
            self._callback(reading)
        return reading

    def close(self) -> None:
        """Leave the optimizer's hooks; readings stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _due(self) -> bool:
        """Say whether the next step is to be read, on all ranks alike; put it off if it cannot be paid for yet."""
        if self._steps < self._next:
            return False
        wait = self._budget.steps_to_wait(self._steps)
        ranks = self.objective.ranks
        if ranks is not None:
            wait = ranks.mean(wait)[0]
        self._next = self._steps + math.ceil(min(wait, self._steps))  # looks again: steps may become faster
        return wait <= 0

    # -- hooks of the optimizer ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._taken = None
        self._open = None
        if self._steps < self._next:
            return
        begun = self._budget.clock()
        if self._due():
            first = _first_that_moves(optimizer)
            lr = _rate(optimizer.param_groups[first])
            limit = stability_limit(optimizer, first) if self._known else math.nan
            threshold = limit / lr if lr > 0 else math.inf
            self._open = (self.objective.space.current(), lr, threshold)
        self._budget.hooked(begun)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._steps += 1
        skipped = getattr(optimizer, "found_inf", None)  # of a gradient scaler that leaves it to a fused optimizer
        if self._open is None or (skipped is not None and bool(skipped)):
            return
        begun = self._budget.clock()
        (before, lr, threshold), self._open = self._open, None
        group = optimizer.param_groups[_first_that_moves(optimizer)]
        wanted, plain = "preconditioned" in self._measurer.wanted, isinstance(optimizer, torch.optim.SGD)
        divisor = self._divisor(threshold) if self._known and (wanted or plain) else None
        self._taken = StepTaken(
            before=before,
            after=self.objective.space.current(),
            divisor=divisor if wanted else None,
            lr=lr,
            threshold=threshold if wanted or (plain and divisor is None) else math.nan,  # of another curvature
            momentum=float(group.get("momentum", 0.0)),
            weight_decay=float(group.get("weight_decay", 0.0)),
        )
        self._budget.hooked(begun)

    def _divisor(self, threshold: float) -> Tensor | None:
        """Return P, weighted so that each group of parameters is held against the threshold of the first that moves.

        It is infinite where the optimizer moves nothing; None where it is 1 everywhere.
        """
        optimizer, space = self.optimizer, self.objective.space
        ratios = dict[int, float]()
        for i, group in enumerate(optimizer.param_groups):
            rate = _rate(group)
            if math.isinf(threshold):  # no group moves
                ratio = 1.0
            else:
                ratio = stability_limit(optimizer, i) / rate / threshold if rate > 0 else math.inf
            ratios |= dict.fromkeys(map(id, group["params"]), ratio)
        weights = [ratios.get(id(p), math.inf) for p in space.tensors.values()]
        alike = all(weight == 1 for weight in weights)
        if alike and isinstance(optimizer, torch.optim.SGD):
            return None
        P = optimizer_divisor(optimizer, space, missing="exclude", unseen="exclude")
        if alike:
            return P
        parts = [torch.full((p.numel(),), weight) for p, weight in zip(space.tensors.values(), weights, strict=True)]
        return P * torch.cat(parts).to(P)

    # -- readings -----------------------------------------------------------------------------------------------------

    def _read(self, step: StepTaken | None, batches: list[Any] | None, loss: Tensor | float | None) -> TrainingReading:
        number, begun = self._steps - 1, time.perf_counter()
        self._measurer.next_step = bool(self._readings) and number - self._readings[-1].step == 1
        with untouched(self.objective, evaluation_mode=self.evaluation_mode):
            try:
                found = self._measurer.take(step, batches)
            except NonFiniteError:
                found = {"loss": math.nan}
        synchronize(self.objective.device)
        return TrainingReading(
            step=number,
            interval=number - self._readings[-1].step if self._readings else 0,
            lr=math.nan if step is None else step.lr,
            threshold=math.nan if step is None else step.threshold,
            train_loss=math.nan if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss),
            highest_loss=self._highest.take(),
            seconds=time.perf_counter() - begun,
            **{name: value for name, value in found.items() if not name.startswith("_")},
        )

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on: tensors, numbers and the readings so far."""
        return {
            "steps": self._steps,
            "next": self._next,
            "budget": self._budget.state(),
            "generator": self._generator.get_state(),
            "followed": {name: vars(found) for name, found in self._measurer.followed.items()},
            "factors": dict(self._measurer.factors),
            "rows": [reading.row() for reading in self._readings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; rows of the folder that were written after it are given up, for they come again.

        Raises:
            InputError: if the state is of a model with other parameters.
        """
        self._measurer.load(state["followed"], state["factors"])
        self._steps, self._next = state["steps"], state["next"]
        self._budget.load(state["budget"])
        self._generator.set_state(state["generator"])
        self._readings = [TrainingReading.from_row(row) for row in state["rows"]]
        self._highest, self._taken = HighestLoss(), None
        if self._rows is not None:
            self._rows.begin_again(self._readings)


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"])


def _first_that_moves(optimizer: Any) -> int:
    """Return the first group of parameters whose rate is not zero; 0 if all are."""
    return next((i for i, group in enumerate(optimizer.param_groups) if _rate(group) > 0), 0)


def _reads(optimizer: Any) -> bool:
    try:
        for i in range(len(optimizer.param_groups)):
            stability_limit(optimizer, i)
    except (InputError, AttributeError):
        return False
    return True


def _wanted(quantities: Sequence[str] | None, optimizer: Any, known: bool, batch_size: int | None) -> frozenset[str]:
    """Return the names of what is measured.

    Raises:
        InputError: for those that are none, or cannot be measured here.
    """
    if quantities is None:
        quantities = ("sharpness", "preconditioned") if known else ("sharpness",)
    if unknown := sorted(set(quantities) - QUANTITIES.keys()):
        raise InputError(f"quantities must be among {', '.join(QUANTITIES)}, got {', '.join(unknown)}.")
    if not quantities:
        raise InputError(f"quantities must name one at least of {', '.join(QUANTITIES)}.")
    wanted = set(quantities)
    if optimizer is None and (alone := sorted(wanted & (NEED_STEP | {"penalties"}))):
        raise InputError(f"{', '.join(alone)} belong to a step of the optimizer; pass it as optimizer=.")
    if "preconditioned" in wanted and not known:
        for i in range(len(optimizer.param_groups)):
            stability_limit(optimizer, i)  # says what is known
    if "penalties" in wanted:
        refuse_penalties(optimizer, batch_size)
    if wanted & {"alignment", "oscillation"}:
        wanted.add("sharpness")  # whose eigenvector they are about
    return frozenset(wanted)
