"""A race of optimizers: what `curvature race` does.

References: Jamieson and Talwalkar (2016), for the search of rates; Holm (1979), for the tests of all pairs together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from analysis.race.course import Count, Job, clock_of, run_job
from analysis.race.decide import race_pairs
from analysis.race.ground import Ground, prepare_ground
from analysis.race.kinds import kind_of
from analysis.race.plan import Entry, RacePlan
from analysis.race.results import Course, CoursePoint, Entrant, Race, Trait
from analysis.race.search import Work, budgets_of, enter
from analysis.records.plan import from_plan
from analysis.run.draft import POINTS, Draft
from analysis.run.lines import append_line, read_lines
from analysis.run.pool import Pool, run_all
from analysis.show.listener import Progress
from analysis.show.wording import number
from analysis.tasks import Task
from curvature.environment.device import is_gpu
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["budgets_expected", "budgets_of_entry", "race_optimizers"]

_APART = 1_000_003  # so that neighbouring seeds share no training


def budgets_expected(plan: RacePlan) -> float:
    """Return how many whole trainings a race usually takes."""
    return sum(budgets_of_entry(entry, plan) for entry in plan.entries())


def budgets_of_entry(entry: Entry, plan: RacePlan) -> float:
    """Return how many whole trainings an entrant usually takes."""
    searched = plan.tune and entry.kind.lr is not None and entry.lr is None
    return plan.seeds + (budgets_of(plan.rates) if searched else 0)


@from_plan(RacePlan)
def race_optimizers(
    objective: Objective | Task,
    plan: RacePlan,
    *,
    generator: torch.Generator | int,
    test_data: Any = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> Race:
    """Train an objective by several optimizers, each with the same budget, and decide who is ahead.

    For every seed all share the initial weights, the batches and the random numbers of each step. Rates are searched by
    successive halving on a further seed (`analysis.race.search`); what that cost is counted apart. Losses are compared
    at the end of the budget by paired tests over seeds, all pairs together at `level` (Holm). A training diverged where
    a loss is not finite or above 1e6 times the start (or 1, if larger), or where it ended a tenth above its start; such
    a one is behind every other of its seed and never chosen.

    Work is counted in gradients of a training batch: how often each step evaluates the loss is counted in every
    training; what an evaluation costs with all its derivatives, once for each optimizer, over its first 40 steps.

    Cost: `budgets_expected(plan)` trainings, looks at all data 22 times a training, sharpness and noise at each end.

    Args:
        objective: the loss, or a task with its test data. The model is put back.
        plan: settings; or pass them one by one.
        generator: source of random numbers, or a seed.
        test_data: as the objective's data; a task brings its own.
        progress: told after each training.
        draft: where trainings are kept, from which an interrupted race goes on.

    Raises:
        InputError: for settings out of range, an unknown optimizer, data that cannot be cut, or several ranks.
        CurvatureError: if none of the optimizers can train this objective.

    Example:
        >>> from torch import nn
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> objective = Objective(nn.Linear(3, 1), nn.MSELoss(), (x, x.sum(1, keepdim=True)))
        >>> race = race_optimizers(objective, optimizers=("sgd", "lbfgs"), budget="4 steps", seeds=3, rates=4,
        ...                        batch_size=16, noise=False, workers=1, generator=0)
        >>> race.leaders()
        ('lbfgs',)
    """
    if isinstance(objective, Task):
        test_data = objective.test_data if test_data is None else test_data
        objective = objective.objective()
    seed = (generator if isinstance(generator, int) else generator.initial_seed()) % 2**40
    seed *= _APART
    mode = objective.model.training
    ground = prepare_ground(objective, plan, test_data=test_data, seed=seed)
    workers = 1 if is_gpu(objective.device) else plan.processes()
    entries = plan.entries()
    rows = _Rows(draft)
    told = _Told(plan, entries, progress)
    with Pool(lambda job: run_job(ground, job), workers, lost=_lost) as pool:

        def known(job: Job) -> Course | Count | None:
            answer = rows.known.get(job.key)
            if answer is not None:
                told.take(job, answer)
            return answer

        def found(job: Job, answer: Course | Count) -> None:
            rows.add(job, answer)
            told.take(job, answer)

        works = run_all([enter(entry, plan) for entry in entries], pool, known=known, found=found)
        workers = pool.workers
    objective.model.train(mode)
    objective.release()
    return _race(ground, plan, dict(zip(entries, works, strict=True)), told.courses, workers)


def _lost(job: Job, why: str) -> Course | Count:
    if job.counts:
        return Count(math.nan, math.nan, why)
    lr = math.nan if job.lr is None else job.lr
    return Course(entrant=job.entry.name, seed=job.seed, lr=lr, share=job.share, points=(), failure=why)


class _Rows:
    """A line for each training that is done; what was done before is known."""

    def __init__(self, draft: Draft | None) -> None:
        self._path: Path | None = None if draft is None else draft.path / POINTS
        self.known: dict[tuple[str, int, str, float], Course | Count] = {}
        if self._path is None or not self._path.is_file():
            return
        try:
            for line in read_lines(self._path, repair=True):
                key, row = json.loads(line)
                self.known[tuple(key)] = _answer(row)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self._path} cannot be read ({error}); begin again with --overwrite.") from error

    def add(self, job: Job, answer: Course | Count) -> None:
        if self._path is not None and self._path.parent.is_dir():
            append_line(self._path, json.dumps([job.key, _row(answer)]))


def _row(answer: Course | Count) -> dict[str, Any]:
    row = dict(vars(answer))
    for name in ("points", "traits"):
        if name in row:
            row[name] = [vars(part) for part in row[name]]
    return row


def _answer(row: dict[str, Any]) -> Course | Count:
    if "points" not in row:
        return Count(**row)
    parts = {
        "points": tuple(CoursePoint(**p) for p in row["points"]),
        "traits": tuple(Trait(**t) for t in row["traits"]),
    }
    return Course(**{**row, **parts})


class _Told:
    """Keeps all trainings, and tells how each entrant gets on."""

    def __init__(self, plan: RacePlan, entries: Sequence[Entry], progress: Progress | None) -> None:
        self.courses: list[Course] = []
        self._plan, self._progress = plan, progress
        self._seeds = dict.fromkeys((e.name for e in entries), 0)
        self._searched = dict.fromkeys((e.name for e in entries), 0.0)
        self._losses: dict[str, list[float]] = {e.name: [] for e in entries}
        self._total = max(1, round(budgets_expected(plan)))

    def take(self, job: Job, answer: Course | Count) -> None:
        name = job.entry.name
        if isinstance(answer, Course):
            self.courses.append(answer)
            if job.seed:
                self._seeds[name] += 1
                self._losses[name].append(answer.end.loss if answer.finished else math.nan)
            else:
                self._searched[name] += job.share
        if self._progress is not None:
            done = sum(self._seeds.values()) + sum(self._searched.values())
            self._progress(f"training\n{self._lines()}", min(self._total, round(done)), self._total)

    def _lines(self) -> str:
        width, whole = max(map(len, self._seeds)), budgets_of(self._plan.rates)
        lines = []
        for name, seeds in self._seeds.items():
            bar = "█" * round(10 * seeds / self._plan.seeds)
            if not seeds:
                bar = "▒" * min(10, round(10 * self._searched[name] / whole))
            losses = [x for x in self._losses[name] if math.isfinite(x)]
            state = f"{seeds}/{self._plan.seeds} seeds" if seeds else "search" if bar else ""
            loss = f"loss {number(sum(losses) / len(losses), 3)}" if losses else ""
            lines.append(f"{name:{width}}  {bar:░<10}  {state:12}{loss}".rstrip())
        return "\n".join(lines)


# -- the outcome ------------------------------------------------------------------------------------------------------


def _race(ground: Ground, plan: RacePlan, works: dict[Entry, Work], courses: Sequence[Course], workers: int) -> Race:
    entrants = tuple(_entrant(entry, work, courses) for entry, work in works.items())
    if not any(c.seed and not c.failure for c in courses):
        said = "; ".join(f"{e.name}: {e.failure}" for e in entrants)
        raise InputError(f"none of the optimizers trained: {said}.")
    start = max((abs(c.points[0].loss) for c in courses if c.points), default=1.0)
    race = Race(
        budget=plan.limit.amount,
        unit=plan.limit.unit,
        entrants=entrants,
        courses=tuple(sorted(courses, key=lambda c: (c.entrant, c.seed, c.share, c.lr))),
        pairs=(),
        metric_pairs=(),
        seeds=plan.seeds,
        level=plan.level,
        metric=ground.metric,
        resolution=1 / max(1.0, ground.test.total_weight) if ground.test and ground.metric == "accuracy" else 0.0,
        searched_by="validation loss" if plan.validation > 0 else "training loss",
        start="drawn by the seed" if ground.fresh else "those of the task",
        batch_size=ground.batch_size,
        clock="CPU time of one thread" if workers > 1 else clock_of(ground.objective.device)[1],
        workers=workers,
        scale="log" if all(c.end.loss >= 0 for c in courses if c.seed and c.finished) else "plain",
        floor=torch.finfo(ground.objective.dtype).eps * start,
        notes=tuple(_notes(ground, entrants, courses, workers)),
    )
    metric_pairs = race_pairs(race, "metric") if ground.metric else ()
    return replace(race, pairs=race_pairs(race), metric_pairs=metric_pairs)


def _entrant(entry: Entry, work: Work, courses: Sequence[Course]) -> Entrant:
    own = [c for c in courses if c.entrant == entry.name and c.seed]
    failed = {c.failure for c in own} if all(c.failure for c in own) else set()
    per_step = work.count.per_evaluation * work.count.evaluations_per_step
    return Entrant(
        name=entry.name,
        title=entry.kind.title,
        optimizer=entry.optimizer,
        schedule=entry.schedule,
        lr=work.lr,
        source=work.source,
        at_edge=work.at_edge,
        gradients_per_step=per_step,
        evaluations_per_step=work.count.evaluations_per_step,
        failure=work.failure or " ".join(sorted(failed)),
    )


def _notes(ground: Ground, entrants: Sequence[Entrant], courses: Sequence[Course], workers: int) -> list[str]:
    plan = ground.plan
    raced = [[c.end.loss for c in courses if c.entrant == e.name and c.seed and c.points] for e in entrants]
    alike = plan.seeds > 1 and all(len(set(own)) < 2 for own in raced)
    notes = [f"{e.name} did not race: {e.failure}." for e in entrants if e.failure]
    raced_in_part = {e.name for e in entrants if not e.failure}
    notes += [
        f"{c.entrant} has no result with seed {c.seed}: {c.failure}."
        for c in courses
        if c.seed and c.failure and c.entrant in raced_in_part
    ]
    notes += [
        f"{e.name}: the rate {number(e.lr, 3)} lies at the end of those tried; a better one may lie beyond."
        for e in entrants
        if e.at_edge
    ]
    if plan.weight_decay is not None and (none := [e.name for e in entrants if not _decays(e)]):
        notes.append(f"Without weight decay, which they do not have: {', '.join(none)}.")
    if any(e.optimizer == "schedule-free" for e in entrants) and _has_running_statistics(ground):
        notes.append("schedule-free is judged at averaged weights, with running statistics of the weights it trains.")
    if ground.drawn:
        notes.append(
            "The loader shuffles: its batches were drawn once, and all trainings share them in that order. Tensors and "
            "a batch size give each seed batches of its own."
        )
    if alike:
        notes.append("All seeds train alike: nothing is drawn at random. Losses are compared as they are.")
    if plan.seeds == 1:
        notes.append("One seed has no spread: nothing is decided.")
    if plan.limit.unit == "seconds":
        notes.append("The budget is in seconds: another machine, or another load, gives another race.")
    if workers < plan.processes():
        notes.append("Trainings ran one after another: processes are forked on Linux, where there is no GPU, only.")
    return [*notes, *sorted({c.note for c in courses if c.note})]


def _has_running_statistics(ground: Ground) -> bool:
    return any(name.endswith("running_mean") for name, _ in ground.objective.model.named_buffers())


def _decays(entrant: Entrant) -> bool:
    return kind_of(entrant.optimizer).takes("weight_decay")
