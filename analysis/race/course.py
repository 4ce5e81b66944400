"""One training of an entrant, from a start that all entrants of its seed share to the end of its budget."""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from analysis.race.counting import Work, gradient_work
from analysis.race.ground import Ground
from analysis.race.plan import Entry
from analysis.race.results import Course, CoursePoint
from analysis.race.schedules import Schedule
from analysis.race.steps import Stepper
from analysis.training.loop import Snapshot, batches_of, put_back, training_loss
from curvature.data.random_states import random_states_kept
from curvature.environment.cost import median_seconds, timed
from curvature.environment.device import is_gpu, synchronize
from curvature.errors import CurvatureError, InputError, NonFiniteError
from optimizers import LearnedOptimizer
from optimizers.shared.base import BaseOptimizer

__all__ = ["Count", "Job", "StepCost", "clock_of", "look_seconds", "run_job", "step_cost"]

_FAR = 1e6  # times the loss at the start, or 1 where that is larger: it has diverged
_RISE = 0.1  # of the start: an end that is so far above it, too
_LOOKS = tuple(sorted({0.0, *(2.0**-k for k in range(5, 10)), *(k / 16 for k in range(1, 17))}))
"""Shares of the budget at which a training is looked at."""
_COUNTED, _EVALUATIONS = 40, 200  # steps whose work is counted, and at most about so many evaluations
_TIMED = 5  # gradients
_TRIED, _LONG = 12, 0.5  # steps for a price, or so many seconds
_STEPS = 100  # that a training is said to take before it is known
_SEEDS = 2_147_483_629  # a prime: seeds of single steps


@dataclass(frozen=True)
class Job:
    """What a process is asked to do."""

    entry: Entry
    seed: int
    """0 searches, others race; what is counted is not looked at."""
    lr: float | None
    share: float
    per_evaluation: float
    """Work of an evaluation of the loss and what goes with it, in gradients; NaN where it is not known."""
    counts: bool = False
    """Count the work of its first steps instead of training to the end."""

    @property
    def key(self) -> tuple[str, int, str, float]:
        """What tells it from others."""
        return self.entry.name, -1 if self.counts else self.seed, f"{self.lr}", self.share


@dataclass(frozen=True)
class Count:
    """Work of an entrant's first steps."""

    per_evaluation: float
    evaluations_per_step: float
    failure: str = ""


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """Return a clock, and what it shows: time of the thread where it is alone at work, so that others cost nothing."""
    if not is_gpu(device) and torch.get_num_threads() == 1:
        return time.thread_time, "CPU time of one thread"

    def wall() -> float:
        synchronize(device)
        return time.perf_counter()

    return wall, "wall clock"


def run_job(ground: Ground, job: Job) -> Course | Count:
    """Do what is asked for and put the model back; what goes wrong is in the result."""
    with put_back(ground.objective.model) as before, random_states_kept():
        try:
            return _count(ground, job) if job.counts else _train(ground, job, before)
        except CurvatureError as error:
            said = " ".join(str(error).split())
        except Exception as error:  # of a model, a loss or an optimizer: this entrant fails, the race goes on
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            ground.objective.release()
    if job.counts:
        return Count(math.nan, math.nan, said)
    return _course(job, points=(), failure=said)


@dataclass(frozen=True)
class StepCost:
    """What a step of an entrant takes."""

    seconds: float = 0.0
    """With its batch."""
    gradients: float = 1.0
    """That it counts as."""
    counted: int = 0
    """Steps whose work will be counted."""
    counted_seconds: float = 0.0
    """Of one of these."""


def step_cost(ground: Ground, entry: Entry) -> StepCost:
    """Time an entrant's first steps, the first two left out. The model is put back.

    Where that fails in any way, so will its trainings, as far as anyone can tell: they are priced at nothing.
    """
    job = Job(entry, 0, entry.lr or entry.kind.lr, 1.0, math.nan, counts=True)
    with put_back(ground.objective.model), random_states_kept(), contextlib.suppress(Exception):
        ground.begin(0)
        optimizer, stepper = _stepper(ground, job)
        taken: list[float] = []
        try:
            _mode(optimizer, "train")
            batches = iter(_steps(ground, 0))
            while len(taken) < _TRIED and sum(taken) < _LONG:
                taken.append(timed(lambda: stepper.step(next(batches)), ground.objective.device)[1])
        finally:
            _mode(optimizer, "eval")
        each, evaluations = statistics.mean(taken[2:] or taken), stepper.evaluations / len(taken)
        counted = max(1, min(_COUNTED, round(_EVALUATIONS / evaluations), ground.plan.limit.steps or _COUNTED))
        work, seconds = timed(lambda: _count(ground, job, most=_TIMED), ground.objective.device)
        per_evaluation = work.per_evaluation if math.isfinite(work.per_evaluation) else 1.0
        return StepCost(each, evaluations * per_evaluation, counted, seconds / _TIMED)
    return StepCost()


def look_seconds(ground: Ground) -> float:
    """Return what a look takes at where the model is."""

    def look() -> None:
        for objective in (ground.objective, ground.test):
            if objective is not None:
                objective.release()  # what it knows of this point: a training is elsewhere at each look
        ground.look(0, 0.0, 0.0, test=True)

    with put_back(ground.objective.model):
        look()  # warms up
        return median_seconds(look, ground.objective.device)


def _course(job: Job, **found: Any) -> Course:
    lr = math.nan if job.lr is None else job.lr
    return Course(entrant=job.entry.name, seed=job.seed, lr=lr, share=job.share, **found)


def _stepper(ground: Ground, job: Job, work: Work | None = None) -> tuple[torch.optim.Optimizer, Stepper]:
    plan, kind, objective = ground.plan, job.entry.kind, ground.objective
    optimizer = kind.make(
        list(objective.space.tensors.values()),
        job.lr,
        loss=objective.settings["loss"],
        model=objective.model,
        seed=(ground.seed + job.seed) % _SEEDS,
        weight_decay=plan.weight_decay,
        steps_per_epoch=ground.per_epoch,
        num_steps=plan.limit.part(job.share).steps or _STEPS,
    )
    form = kind.form
    if ":" in job.entry.optimizer:  # of a user
        form = "loss" if isinstance(optimizer, BaseOptimizer) else form
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        form = "closure" if form == "backward" and closure and closure.default is closure.empty else form
    return optimizer, Stepper(
        form, optimizer, objective, clip_norm=plan.clip_norm, clip_value=plan.clip_value, work=work
    )


def _steps(ground: Ground, seed: int) -> Iterator[Any]:
    """Yield the batches of a seed; random numbers of a step are the same for all, whatever they drew before."""
    for step, batch in enumerate(batches_of(ground.objective, ground.plan.batch_size, ground.seed + seed)):
        torch.manual_seed(((ground.seed + seed) * 1_000_003 + step) % _SEEDS)
        yield batch


def _train(ground: Ground, job: Job, before: Snapshot) -> Course:
    if ground.plan.limit.unit == "gradients" and math.isnan(job.per_evaluation):
        raise InputError("its work could not be counted; give a budget in steps or seconds.")
    clock, _ = clock_of(ground.objective.device)
    ground.begin(job.seed)
    per_gradient = _seconds_per_gradient(ground, job.seed, clock) if job.seed else math.nan
    before.restore()  # running statistics, which these gradients moved
    ground.begin(job.seed)
    optimizer, stepper = _stepper(ground, job)
    budget = ground.plan.limit.part(job.share)
    schedule = Schedule(job.entry.schedule, optimizer, budget.steps)
    looks = list(_LOOKS if job.seed else (0.0, 1.0))
    points, diverged, spent, steps = list[CoursePoint](), "", 0.0, 0

    def gradients() -> float:
        return stepper.evaluations * job.per_evaluation if steps else 0.0

    def look() -> None:
        points.append(ground.look(steps, spent, gradients(), test=bool(job.seed)))

    look()
    looks.pop(0)
    start = points[0].loss
    try:
        _mode(optimizer, "train")
        for batch in _steps(ground, job.seed):
            begun = clock()
            try:
                loss = float(stepper.step(batch))
            except (NonFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is there
                loss = math.nan
            spent, steps = spent + clock() - begun, steps + 1
            if not abs(loss) <= _FAR * max(1.0, abs(start)):
                diverged = f"at step {steps}"
                break
            used = budget.used(steps, spent, gradients())
            if isinstance(optimizer, LearnedOptimizer) and budget.steps is None:
                _tell_steps(optimizer, steps, used)
            if used >= looks[0] - 1e-9:
                _mode(optimizer, "eval")
                look()
                _mode(optimizer, "train")
                looks = [share for share in looks if share > used + 1e-9]
                if not math.isfinite(points[-1].loss):
                    diverged = f"at step {steps}"
            if not looks or diverged:
                break
            schedule.advance(used)
    finally:
        _mode(optimizer, "eval")
    if not diverged and points[-1].loss - start > _RISE * abs(start):
        diverged = "ended above its start"
    traits, note = ground.traits(job.seed) if job.seed and not diverged else ((), "")
    return _course(
        job, points=tuple(points), diverged=diverged, note=note, seconds_per_gradient=per_gradient, traits=traits
    )


def _mode(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Tell optimizers that step at one point and are judged at another ("schedule-free"), or put hooks on the model."""
    switch = getattr(optimizer, name, None)
    if callable(switch):
        switch()


def _tell_steps(optimizer: LearnedOptimizer, steps: int, used: float) -> None:
    """Tell an optimizer that has to know how many steps the whole budget will give, from what a part of it gave."""
    for group in optimizer.param_groups:
        group["num_steps"] = max(steps, round(steps / used)) if used > 0 else _STEPS


def _seconds_per_gradient(ground: Ground, seed: int, clock: Callable[[], float]) -> float:
    """Return the time of a gradient of the first batch, the median of a few after one that warms up."""
    objective = ground.objective
    batch, params = next(iter(_steps(ground, seed))), list(objective.space.tensors.values())
    taken = []
    for _ in range(1 + _TIMED):
        begun = clock()
        torch.autograd.grad(training_loss(objective, batch), params, allow_unused=True)
        taken.append(clock() - begun)
    return sorted(taken[1:])[_TIMED // 2]


def _count(ground: Ground, job: Job, *, most: int = _COUNTED) -> Count:
    ground.begin(0)
    work, objective = Work(), ground.objective
    params = list(objective.space.tensors.values())
    optimizer, stepper = _stepper(ground, job, work)
    of_gradients, steps = 0.0, 0
    try:
        _mode(optimizer, "train")
        for batch in _steps(ground, 0):
            of_gradient = gradient_work(partial(training_loss, objective, batch), params)
            try:
                with work:
                    stepper.step(batch)
            except NonFiniteError:
                break
            of_gradients, steps = of_gradients + of_gradient, steps + 1
            if steps == most or stepper.evaluations >= _EVALUATIONS or steps == ground.plan.limit.steps:
                break
    finally:
        _mode(optimizer, "eval")
    if not steps or not of_gradients > 0:
        return Count(math.nan, math.nan)
    per_step = stepper.evaluations / steps
    return Count(work.total / of_gradients * steps / stepper.evaluations, per_step)
