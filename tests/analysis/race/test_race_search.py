"""The search of rates, budgets, schedules and clipping against closed forms and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from analysis.race.course import Count, Job
from analysis.race.kinds import GROUPS, kind_of
from analysis.race.plan import Budget, RacePlan
from analysis.race.results import Course, CoursePoint
from analysis.race.schedules import SCHEDULES, Schedule
from analysis.race.search import Work, budgets_of, enter, halvings
from curvature.errors import InputError


def answer(job: Job, loss: float, validation: float = math.nan) -> Course:
    points = tuple(
        CoursePoint(steps=s, seconds=0.0, gradients=0.0, loss=x, validation=validation, metric=-1e9)
        for s, x in ((0, 10.0), (1, loss))
    )
    bad = "" if math.isfinite(loss) else "at step 1"
    return Course(entrant="", seed=job.seed, lr=job.lr or math.nan, share=job.share, points=points, diverged=bad)


def played(plan: RacePlan, loss: Callable[[Job], float], **more: Any) -> tuple[Work, list[Job]]:
    """Return the outcome of an entrant whose losses are those of a function, and all that it did."""
    play = enter(plan.entries()[0], plan)
    jobs, done = next(play), list[Job]()
    try:
        while True:
            done += jobs
            jobs = play.send([Count(1.0, 1.0) if j.counts else answer(j, loss(j), **more) for j in jobs])
    except StopIteration as end:
        return end.value, done


def test_halving_by_hand() -> None:
    assert halvings(8) == [0.25, 0.5, 1.0]
    assert halvings(2) == [1.0]
    assert halvings(3) == [0.5, 1.0]
    assert budgets_of(8) == 8 / 4 + 4 / 2 + 2
    plan = RacePlan(optimizers=("adam",), rates=8, seeds=3)
    best = kind_of("adam").lr
    assert best is not None
    found, jobs = played(plan, lambda j: abs(math.log(j.lr / best / 10)) if j.lr else 0.0)
    assert found.lr == pytest.approx(10 * best)
    assert (found.source, found.at_edge, found.failure) == ("searched", False, "")
    rounds = [[j.share for j in jobs if j.seed == 0 and not j.counts].count(share) for share in (0.25, 0.5, 1.0)]
    assert rounds == [8, 4, 2]
    raced = [j for j in jobs if j.seed]
    assert [(j.seed, j.lr) for j in raced] == [(seed, found.lr) for seed in (1, 2, 3)]  # never the seed of the search


def test_the_search_goes_beyond_its_ends_and_says_so() -> None:
    plan = RacePlan(optimizers=("adam",), rates=4)
    usual = kind_of("adam").lr
    assert usual is not None
    found, jobs = played(plan, lambda j: abs(math.log((j.lr or 1.0) / usual / 100)))
    assert found.lr == pytest.approx(100 * usual)
    assert not found.at_edge
    found, jobs = played(plan, lambda j: -(j.lr or 0.0))
    assert found.at_edge
    assert len(jobs) < 40
    lowest, _ = played(plan, lambda j: (j.lr or 0.0) if (j.lr or 1.0) < usual / 100 else math.inf)
    assert lowest.lr < usual / 100  # all the first ones diverged


def test_what_diverges_is_never_chosen() -> None:
    plan = RacePlan(optimizers=("adam",), rates=4)
    found, jobs = played(plan, lambda _: math.nan)
    assert math.isnan(found.lr)
    assert found.failure == "every rate of its search diverged"
    assert not [j for j in jobs if j.seed]
    usual = kind_of("adam").lr or 1.0
    found, _ = played(plan, lambda j: math.nan if (j.lr or 0.0) > 0.9 * usual else 5.0 + (j.lr or 0.0))
    assert found.lr < 0.9 * usual
    equal, _ = played(plan, lambda _: 1.0)
    assert math.isfinite(equal.lr)


def test_held_out_data_choose_where_there_are_any() -> None:
    plan = RacePlan(optimizers=("adam",), rates=2, validation=0.2)
    lr = kind_of("adam").lr or 1.0
    play = enter(plan.entries()[0], plan)
    next(play)
    jobs = play.send([Count(1.0, 1.0)])
    while all(j.seed == 0 for j in jobs):
        jobs = play.send([answer(j, loss=-(j.lr or 0.0), validation=abs(math.log((j.lr or 1.0) / lr))) for j in jobs])
    assert jobs[0].lr == pytest.approx(lr)


def test_those_without_a_rate_search_none() -> None:
    found, jobs = played(RacePlan(optimizers=("lbfgs",), seeds=2), lambda _: 1.0)
    assert (found.source, [j.lr for j in jobs if not j.counts]) == ("none", [None, None])
    found, jobs = played(RacePlan(optimizers=("adam@0.5",), seeds=2), lambda _: 1.0)
    assert (found.source, [j.lr for j in jobs if not j.counts]) == ("given", [0.5, 0.5])
    found, _ = played(RacePlan(optimizers=("adam",), tune=False), lambda _: 1.0)
    assert (found.source, found.lr) == ("default", kind_of("adam").lr)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("300", (300, "steps")),
        ("300 steps", (300, "steps")),
        ("1 step", (1, "steps")),
        ("20s", (20, "seconds")),
        ("1.5 seconds", (1.5, "seconds")),
        ("2e3 gradients", (2000, "gradients")),
    ],
)
def test_budgets(text: str, budget: tuple[float, str]) -> None:
    found = Budget.read(text)
    assert (found.amount, found.unit) == budget
    assert found.used(*[found.amount / 2] * 3) == 0.5


def test_refusals_of_settings() -> None:
    for bad in ("0 steps", "steps", "-3", "1.5 steps", "3 epochs"):
        with pytest.raises(InputError, match="budget must be a"):
            RacePlan(budget=bad)
    with pytest.raises(InputError, match=r"no optimizer 'adamv' \(did you mean adam or"):
        RacePlan(optimizers=("adamv",)).entries()
    with pytest.raises(InputError, match="takes no learning rate"):
        RacePlan(optimizers=("trust-region@0.1",))
    with pytest.raises(InputError, match=r"as in adamw@0.001"):
        RacePlan(optimizers=("adamw@fast",))
    with pytest.raises(InputError, match="schedules must be among"):
        RacePlan(schedules=("cosin",))
    with pytest.raises(InputError, match="measures must be among"):
        RacePlan(measures=("size",))
    plan = RacePlan(optimizers=("first-order", "sgd", "lbfgs"), schedules=("constant,linear",))
    names = [e.name for e in plan.entries()]
    assert len(names) == 2 * len(GROUPS["first-order"]) + 1
    assert {"sgd", "sgd, linear", "lbfgs"} < set(names)


def expected(name: str, n: int) -> list[float]:
    """Return the share of the rate at each step, from the definitions."""
    warm = max(1, round(0.05 * n))

    def cosine(t: float, length: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * t / length))

    def restarts(t: int) -> float:
        first = math.ceil((n - warm) / 7)
        for begin, length in ((0, first), (first, 2 * first), (3 * first, 4 * first)):
            if t < begin + length:
                return cosine(t - begin, length)
        raise AssertionError

    rise = [(t + 1) / (warm + 1) for t in range(warm)]
    return {
        "constant": [1.0] * n,
        "factor": [0.01 ** (t / n) for t in range(n)],
        "multi-step": [1.0 if t < n // 2 else 0.1 if t < 3 * n // 4 else 0.01 for t in range(n)],
        "cosine": [cosine(t, n) for t in range(n)],
        "cosine-warmup": [*rise, *(cosine(t, n - warm) for t in range(n - warm))],
        "cosine-restarts": [*rise, *(restarts(t) for t in range(n - warm))],
        "inverse-sqrt": [min((t + 1) / warm, math.sqrt(warm / (t + 1))) for t in range(n)],
        "linear": [1 - t / n for t in range(n)],
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_their_definitions(name: str) -> None:
    n, lr = 80, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr)
    schedule, seen = Schedule(name, optimizer, n), []
    for step in range(n):
        seen.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        schedule.advance((step + 1) / n)
    assert seen == pytest.approx(expected(name, n), rel=1e-5, abs=1e-7)
    timed = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr)
    by_time = Schedule(name, timed, None)  # a budget in seconds: by the share that was spent
    timed.step()
    by_time.advance(0.5)
    assert timed.param_groups[0]["lr"] / lr == pytest.approx(expected(name, 1000)[500], rel=1e-4, abs=1e-6)
