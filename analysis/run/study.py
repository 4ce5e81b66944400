"""A study: what a command measures, and from a task's name to its complete record.

A new one needs a plan (its settings), a record (`StudyRun` with the result), a price in gradients, the measurement, and
the account of it; loading, checking, timing, storing, the terminal's tables and the report are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch

from analysis.run.preparation import Request, load, prepare
from analysis.run.store import Record
from analysis.show.account import Account
from analysis.show.listener import Listener, Progress
from analysis.show.wording import duration, number
from curvature.environment.cost import median_seconds, timed
from curvature.objective.objective import Objective

__all__ = ["Study", "StudyCost", "StudyRun", "run_study"]

P = TypeVar("P")
R = TypeVar("R", bound="StudyRun")


@dataclass(frozen=True, kw_only=True)
class StudyCost:
    """What a study was expected to cost, and what it did."""

    num_gradients: float
    """Expected price in gradients of the loss over all data; a Hessian product counts as two."""
    seconds_per_gradient: float
    """Wall clock of the one that was timed."""
    expected_seconds: float
    """The product of both."""
    seconds: float
    """Wall clock that was spent; NaN before."""


@dataclass(frozen=True, kw_only=True)
class StudyRun(Record):
    """The record of a study; a subclass adds its result."""

    num_params: int
    """Number of parameters the loss is a function of."""
    total_weight: float
    """Number of loss terms."""
    dtype: str
    """Precision of the parameters."""
    device: str
    """Where it was computed."""
    cost: StudyCost | None
    """Before and after; None where nothing had to be measured."""


@dataclass(frozen=True)
class Study(Generic[P, R]):
    """What makes one kind of measurement."""

    record: type[R]
    """Its record, with kind and result."""
    price: Callable[[Objective, P], float]
    """Expected gradients of the loss over all data."""
    measure: Callable[[Objective, P, torch.Generator, Progress], Any]
    """The measurement; told are the stage, how many stages are done, and how many there are."""
    account: Callable[[R], Account]
    """What there is to tell of it."""


def run_study(study: Study[P, R], request: Request, plan: P, *, listener: Listener | None = None) -> R:
    """Measure a task's model and return the results with all that produced them. Nothing is written.

    Args:
        study: what to measure.
        request: which model, on what.
        plan: the study's settings, a dataclass.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or Listener()
    ready = prepare(*load(request, listener), request, listener, groups=False)
    objective = ready.objective
    with listener.doing("timing one gradient"):
        seconds = _seconds_per_gradient(objective)
    gradients = study.price(objective, plan)
    cost = {"num_gradients": gradients, "seconds_per_gradient": seconds, "expected_seconds": gradients * seconds}
    each, total = duration(seconds), duration(gradients * seconds)
    listener.priced(f"estimate: about {number(gradients, 2)} gradients of {each} each, {total}", 1, "stages")
    generator = torch.Generator(device=objective.device).manual_seed(request.seed)
    result, spent = timed(lambda: study.measure(objective, plan, generator, listener.advanced), objective.device)
    return study.record(
        **ready.record(request),
        settings={**request.settings, **asdict(plan)},  # type: ignore[call-overload]
        num_params=objective.num_params,
        total_weight=objective.total_weight,
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        cost=StudyCost(**cost, seconds=spent),
        **{study.record.result: result},
    )


def _seconds_per_gradient(objective: Objective) -> float:
    """Return the wall clock of one gradient over all data; the first, which also loads and warms up, does not count."""
    objective.loss_and_gradient()
    return median_seconds(objective.loss_and_gradient, objective.device)
