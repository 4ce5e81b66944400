"""A study: what a command measures, and from a task's name, or an objective, to its complete record.

A new one needs a plan (its settings), a record (`StudyRun` with the result and its report), a price, and the
measurement; options, loading, checking, timing, storing, the terminal's tables and the page are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from analysis.records.plan import Plan
from analysis.run.cores import one_thread
from analysis.run.draft import Draft
from analysis.run.preparation import Request, load, prepare
from analysis.run.record import Record
from analysis.run.report import write_report
from analysis.run.saving import save_run
from analysis.show.listener import Listener
from analysis.show.wording import duration, number
from analysis.tasks import Task
from analysis.tasks.checkpoint_files import files_of, sha256_of
from curvature.environment.cost import median_seconds, timed
from curvature.generators import AnyGenerator, as_generator
from curvature.objective.objective import Objective
from curvature.objective.shift import gradient_at, loss_at
from curvature.operators.hessian import HessianOperator

__all__ = ["Part", "Price", "Study", "StudyCost", "StudyRun", "Work", "run_study", "study_objective"]

P = TypeVar("P", bound=Plan)
R = TypeVar("R", bound="StudyRun")


@dataclass(frozen=True)
class Price:
    """What a measurement will cost, before it is paid."""

    text: str
    """In words: "about 12 gradients of 3 ms each"."""
    seconds: float
    """Wall clock."""
    total: int = 1
    """Units of work that progress is told in."""
    unit: str = "stages"
    """What these are."""


@dataclass(frozen=True)
class Part:
    """Something that a measurement does many times, and that it has timed itself."""

    count: float
    what: str
    seconds: float
    """Of one of them, from a few."""
    gradients: float = 0.0
    """About so many gradients one of them evaluates, of data however many."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measurement will do, in walks over all data; the units are timed apart, as their ratios vary by model."""

    products: float = 0.0
    """Products with a curvature matrix at the objective's own point, by column."""
    gradients: float = 0.0
    """Gradients at points where no graph is kept."""
    losses: float = 0.0
    """Losses without a graph."""
    parts: tuple[Part, ...] = ()
    """What comes in other sizes than all data, such as pieces of them or steps on batches."""
    workers: int = 1
    """Processes that share it."""


@dataclass(frozen=True, kw_only=True)
class StudyCost:
    """What a study was expected to cost, and what it did."""

    expected: str
    """The price in words, as it was told before."""
    expected_seconds: float
    """Wall clock that was expected."""
    seconds: float
    """Wall clock that was spent."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyRun(Record):
    """The record of a study; a subclass adds its result, and the report of it."""

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

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder that the command writes: numbers, arrays, the page and its figures; and return its path.

        Args:
            folder: where; it must not exist, be empty, or hold a run that `overwrite` gives up.
            overwrite: replace a run that is there.

        Raises:
            InputError: if the folder holds something that may not be replaced, or cannot be written to.
            WriteError: if something could not be written; its `folder` says where the numbers are.
        """
        return save_run(self, Path(folder), overwrite=overwrite, finish=lambda draft: write_report(self, draft))


@dataclass(frozen=True)
class Study(Generic[P, R]):
    """What makes one kind of measurement."""

    record: type[R]
    """Its record, with kind, result and report."""
    plan: type[P]
    """Its settings."""
    measure: Callable[..., Any]
    """`measure(objective, plan, *, generator, progress)` -> the result; with `resumable` also `draft`."""
    price: Callable[..., Price | Work]
    """`price(objective, plan)` -> what that costs; with `held_out` also `test_data`."""
    groups: bool = False
    """Whether data in one piece are cut into groups, for errors over the data."""
    num_vectors: Callable[[P], int] = lambda _: 0
    """How many vectors as long as the parameters the record holds."""
    unit: str = "stages"
    """What progress is told in, where the price is one of work."""
    resumable: bool = False
    """Whether it keeps what it finds in a draft, from which an interrupted run goes on."""
    held_out: bool = False
    """Whether `measure` and `price` also take `test_data`, those of the task."""


def run_study(
    study: Study[P, R],
    request: Request,
    plan: P,
    *,
    draft: Callable[[], Draft | None] = lambda: None,
    listener: Listener | None = None,
) -> R:
    """Measure a task's model and return the results with all that produced them. Nothing is written.

    Args:
        study: what to measure.
        request: which model, on what.
        plan: the study's settings.
        draft: of a resumable study, where it keeps what it finds; asked for once the task is there.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or Listener()
    task, objective = load(request, listener)
    generator = torch.Generator(device=objective.device).manual_seed(request.seed)
    return _studied(study, request, task, objective, plan, generator, draft(), listener)


def study_objective(
    study: Study[P, R],
    objective: Objective,
    plan: P,
    *,
    generator: AnyGenerator,
    name: str | None = None,
    check: bool = True,
    listener: Listener | None = None,
) -> R:
    """Measure an objective and return the same record that the command makes of a task; see `analysis.measure`."""
    generator = as_generator(generator, objective.device)
    call = f"analysis.measure({study.record.kind!r}, objective, generator={generator.initial_seed()})"
    request = Request(task="", seed=generator.initial_seed(), check=check, command=call)
    task = Task(name=name or type(objective.model).__name__, model=objective.model, prepared=objective)
    return _studied(study, request, task, objective, plan, generator, None, listener or Listener())


def _studied(
    study: Study[P, R],
    request: Request,
    task: Task,
    objective: Objective,
    plan: P,
    generator: torch.Generator,
    draft: Draft | None,
    listener: Listener,
) -> R:
    names = [f.name for f in fields(plan)]  # type: ignore[arg-type]  # every plan is a dataclass
    settings = {**request.settings(objective), **{name: _plain(getattr(plan, name)) for name in names}}
    if draft is not None:
        draft.begin(task, objective, request, settings)
    with prepare(task, objective, request, listener, groups=study.groups) as (objective, checked):
        with listener.doing("timing"):
            of_data = {"test_data": task.test_data} if study.held_out else {}
            price = study.price(objective, plan, **of_data)
            price = price if isinstance(price, Price) else _priced(objective, price, study.unit)
        ready = checked()
    listener.priced(f"estimate: {price.text}, {duration(price.seconds)}", price.total, price.unit)
    kept: dict[str, Any] = {"draft": draft} if study.resumable else {}
    if study.held_out:
        kept["test_data"] = task.test_data
    result, seconds = timed(
        lambda: study.measure(objective, plan, generator=generator, progress=listener.advanced, **kept),
        objective.device,
    )
    return study.record(
        **ready.record(request),
        settings=settings,
        num_params=objective.num_params,
        total_weight=objective.total_weight,
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        cost=StudyCost(expected=price.text, expected_seconds=price.seconds, seconds=seconds),
        **{study.record.result: result},
    )


def _priced(objective: Objective, work: Work, unit: str) -> Price:
    """Return what work costs. Each unit that is needed is timed; its first run, which warms up, does not count."""
    here, device = objective.space.current(), objective.device
    H, v = HessianOperator(objective), torch.ones_like(here)
    units: list[tuple[float, str, Callable[[], object]]] = [
        (work.gradients, "gradients", lambda: gradient_at(objective, here)),  # first: products would leave one behind
        (work.losses, "losses", lambda: loss_at(objective, here)),
        (work.products, "curvature products", lambda: H @ v),
    ]
    parts = [(part.count, part.what, part.seconds) for part in work.parts if part.count]
    with one_thread() if work.workers > 1 else nullcontext():
        for count, of, run in units:
            if count:
                run()
                parts.append((count, of, median_seconds(run, device, objective.ranks)))
    text = ", ".join(f"{number(count, 2)} {of} of {duration(each)}" for count, of, each in parts)
    seconds = sum(count * each for count, _, each in parts) / work.workers
    if work.workers > 1:
        text += f" in {work.workers} processes"
    return Price(f"about {text}", seconds, unit=unit)


def _plain(value: Any) -> Any:
    """Return a setting as a record has it: of a file its name and digest."""
    if isinstance(value, Path):
        return {"file": value.name, "sha256": sha256_of(files_of(value))}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
