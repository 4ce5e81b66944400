"""The largest stable learning rate, by branches: what `curvature lr` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from analysis.learning_rate.branches import Branches
from analysis.learning_rate.results import Branch, Estimate, LearningRateRange, ThresholdPoint, WarmUp
from analysis.learning_rate.search import Ends, Grid, ends_of
from analysis.records.plan import from_plan, setting
from analysis.run.draft import Draft
from analysis.show.listener import Progress
from analysis.show.wording import number
from analysis.training.loop import MakeOptimizer, TrainingPlan, put_back, take_step
from analysis.training.results import TrainingReading
from analysis.training.tracker import CurvatureTracker
from curvature.arguments import checked_fields
from curvature.data.random_states import random_states_kept
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.operators.preconditioned import stability_limit

__all__ = ["LearningRatePlan", "branches_expected", "critical_learning_rate"]

_SHORT = 8  # a survey's branches have the steps over this
_PROBES = (1e-3, 0.1, 10.0, 1e3)  # rates of the step along which the first guess is made, until it is bracketed
_PLAIN_GUESS = 1e-2  # where no other can be made
_RISEN = 1.2  # from here on a threshold has risen
_MOST = 0.8  # of its rise
_DENSE = 3  # readings of the threshold are a third of the steps so far apart


@checked_fields
@dataclass(frozen=True, kw_only=True)
class LearningRatePlan(TrainingPlan):
    """Which training, and how closely its rates are searched."""

    steps: int = setting(200, "Steps of the training that the rate is for.", least=8)
    seeds: int = setting(3, "Seeds: of the order of batches, dropout and, with --fresh, the parameters.", least=1)
    resolution: float = setting(
        math.sqrt(2), "Factor between the largest stable rate of a seed and the smallest unstable one.", above=1, most=4
    )
    warmup: bool = setting(True, "Also find out what a warm-up does.", flag="--warmup/--no-warmup")


def branches_expected(plan: LearningRatePlan) -> float:
    """Return how many whole trainings a search usually takes, for its price."""
    closer = math.log(2) / math.log(plan.resolution)  # halvings of a factor of 4
    return 6 + max(0.0, math.log2(2 * closer)) + 5 * (plan.seeds - 1) + (5 if plan.warmup else 0)


@from_plan(LearningRatePlan)
def critical_learning_rate(
    objective: Objective,
    plan: LearningRatePlan,
    *,
    generator: torch.Generator,
    make_optimizer: MakeOptimizer | None = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> LearningRateRange:
    """Find the largest stable learning rate of a training and the best one, as intervals, by training at some.

    Each branch starts from where the objective stands (with `fresh`, from parameters drawn by its seed), trains with
    one rate, and is judged at its end; see `LearningRateRange` for what counts as unstable. A survey of branches of an
    eighth of the steps, around the critical step of the optimizer's first update, finds where to look; branches of all
    steps decide: bisection on a logarithmic grid of rates, and halvings below it for the best rate. Further seeds begin
    where the first one ended. With `warmup`, a training at the best rate shows how the threshold moves, and branches
    with a linear warm-up show what it is worth.

    The largest stable rate is not the best one: it lay 7 to 76 times above it for Adam, 2 to 14 times for momentum.

    Cost: about 15 to 25 trainings of `steps` for three seeds, those that diverge cut short. The model is put back.

    Args:
        objective: of one batch in memory, where `batch_size` cuts it.
        plan: settings; or pass them one by one.
        generator: source of random numbers, on the objective's device, or a seed.
        make_optimizer: `make(params, lr)`, any optimizer of torch; default: that of the plan.
        progress: told after each branch.
        draft: where branches are kept, from which an interrupted search goes on.

    Raises:
        InputError: for settings out of range, data that cannot be cut, or several ranks.
        NonFiniteError: if the loss at the start is not finite.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> data = (torch.eye(2), torch.zeros(2, 1))  # curvature 1: gradient descent is stable below 2
        >>> found = critical_learning_rate(Objective(model, nn.MSELoss(), data), warmup=False, generator=0)
        >>> found.lower < 2 < found.upper < 1.5 * found.lower
        True
    """
    if objective.process_group is not None:
        raise InputError("this trains in one process; give an objective without process_group.")
    seed = generator.initial_seed() % 2**62
    expected = branches_expected(plan)

    def told(taken: list[Branch]) -> None:
        if progress is not None:
            done = sum(branch.steps for branch in taken) // plan.steps
            last = f"rate {number(taken[-1].lr, 3)}: loss {number(taken[-1].loss, 3)}"
            progress(f"training\n{last}", min(done, math.ceil(expected)), math.ceil(expected))

    with put_back(objective.model) as before, random_states_kept():
        objective.model.train()
        branches = Branches(
            objective,
            before,
            make_optimizer or plan.make_optimizer,
            batch_size=plan.batch_size,
            fresh=plan.fresh,
            seed=seed,
            draft=draft,
            told=told,
        )
        found = _search(branches, plan, generator)
    objective.release()
    return found


def _search(branches: Branches, plan: LearningRatePlan, generator: torch.Generator) -> LearningRateRange:
    estimates, name, notes = _estimates(branches, generator), "", list[str]()
    first = estimates[0].lr if estimates else _PLAIN_GUESS
    grid = Grid(first, plan.resolution)
    short = max(2, plan.steps // _SHORT)
    survey = branches.search(0, [-8 * grid.octave, -4 * grid.octave, 0], short, grid, depth=0)
    places = _begin(ends_of(survey, branches.start(0))) or [0]
    found: list[Ends] = []
    every: list[dict[int, float]] = []
    for seed in range(plan.seeds):
        losses = branches.search(seed, places, plan.steps, grid, depth=2 if seed == 0 else 1)
        ends = ends_of(losses, branches.start(seed))
        if ends is None:
            notes.append(
                f"No rate lowered the loss from its start ({number(branches.start(seed), 3)}): is it the end of a "
                "training already? With fresh parameters (fresh=True, --fresh) it begins anew."
            )
            break
        if every and losses.items() <= every[0].items():
            notes.append("All seeds train alike: nothing is drawn at random. One was enough.")
            break
        found, every, places = [*found, ends], [*every, losses], _begin(ends)
        if not ends.monotone:
            notes.append(f"Seed {seed}: a rate above the smallest unstable one was stable; the interval is the lower.")
        if ends.high is None:
            notes.append(f"Seed {seed}: no rate up to {number(grid.lr(max(losses)), 3)} was unstable.")
    threshold: tuple[ThresholdPoint, ...] = ()
    warmup = None
    if plan.warmup and found:
        threshold = _threshold(branches, grid.lr(found[0].best), plan.steps, generator)
        if found[0].high is not None:
            warmup = _warmed_up(branches, grid, found[0], every[0], threshold, plan.steps)
    name = type(branches.make(first)).__name__
    low = tuple(grid.lr(ends.low) for ends in found)
    high = tuple(math.inf if ends.high is None else grid.lr(ends.high) for ends in found)
    around = [_neighbours(grid, ends.best, losses) for ends, losses in zip(found, every, strict=True)]
    margin = plan.resolution if len(found) > 1 else 1.0
    return LearningRateRange(
        lower=min(low, default=math.nan) / margin,
        upper=max(high, default=math.nan) * margin,
        seed_lower=low,
        seed_upper=high,
        best=tuple(grid.lr(ends.best) for ends in found),
        best_lower=min((below for below, _ in around), default=math.nan),
        best_upper=max((above for _, above in around), default=math.nan),
        steps=plan.steps,
        num_steps=sum(branch.taken for branch in branches.taken),
        branches=tuple(branches.taken),
        estimates=estimates,
        threshold=threshold,
        warmup=warmup,
        optimizer=name,
        notes=tuple(notes),
    )


def _begin(ends: Ends | None) -> list[int]:
    """Return where a search starts that another one has ended like this."""
    if ends is None:
        return []
    return sorted({ends.best, ends.low} | ({ends.high} if ends.high is not None else set()))


def _neighbours(grid: Grid, best: int, losses: dict[int, float]) -> tuple[float, float]:
    below, above = [k for k in losses if k < best], [k for k in losses if k > best]
    return grid.lr(max(below)) if below else 0.0, grid.lr(min(above)) if above else math.inf


# -- how the threshold moves ------------------------------------------------------------------------------------------


def _estimates(branches: Branches, generator: torch.Generator) -> tuple[Estimate, ...]:
    """Return what the first step shows: the rates at which it is not stable any more."""
    points = []
    for probe in _PROBES:
        points += _read(branches, probe, 1, generator)
        if math.isfinite(points[-1].critical):
            break
    critical, edge = points[-1].critical, points[0].edge
    said = [("critical step of the first update", critical), ("edge of stability at the first step", edge)]
    return tuple(Estimate(name=name, lr=lr) for name, lr in said if math.isfinite(lr) and lr > 0)


def _threshold(branches: Branches, lr: float, steps: int, generator: torch.Generator) -> tuple[ThresholdPoint, ...]:
    return tuple(_read(branches, lr, steps, generator))


def _read(branches: Branches, lr: float, steps: int, generator: torch.Generator) -> list[ThresholdPoint]:
    points: list[ThresholdPoint] = []
    tracker: CurvatureTracker | None = None
    for step, (optimizer, loss) in enumerate(branches.steps(0, lr, steps)):
        if tracker is None:
            quantities = ("critical", "preconditioned") if _known(optimizer) else ("critical",)
            tracker = CurvatureTracker(
                branches.objective, optimizer, quantities=quantities, budget=None, generator=generator
            )
        tracker.every = max(1, step // _DENSE)
        reading = tracker.step(take_step(optimizer, loss))
        if reading is not None:
            points.append(_point(reading))
    if tracker is not None:
        tracker.close()
    return points


def _point(reading: TrainingReading) -> ThresholdPoint:
    bracketed = reading.critical_status == "OK"
    return ThresholdPoint(
        step=reading.step,
        critical=2 / reading.critical_sharpness if bracketed else math.nan,
        edge=reading.lr / reading.stability if reading.stability > 0 else math.nan,
    )


def _known(optimizer: torch.optim.Optimizer) -> bool:
    try:
        stability_limit(optimizer)
    except InputError:
        return False
    return True


def _warmed_up(
    branches: Branches,
    grid: Grid,
    ends: Ends,
    losses: dict[int, float],
    threshold: Sequence[ThresholdPoint],
    steps: int,
) -> WarmUp:
    """Search the largest stable rate with a warm-up as long as the threshold takes for most of its rise."""
    assert ends.high is not None
    length, rise = _rise(threshold, steps)
    known = {place: loss for place, loss in losses.items() if place <= ends.best}
    warmed = branches.search(0, [ends.low, ends.high], steps, grid, depth=0, warmup=length, known=known)
    found = ends_of(warmed, branches.start(0))
    if found is None:
        return WarmUp(steps=length, rise=rise, lower=math.nan, upper=math.nan)
    upper = math.inf if found.high is None else grid.lr(found.high)
    return WarmUp(steps=length, rise=rise, lower=grid.lr(found.low), upper=upper)


def _rise(threshold: Sequence[ThresholdPoint], steps: int) -> tuple[int, float]:
    """Return the length of a warm-up, and how much the threshold rises in it."""
    usual = max(1, steps // 10)
    points = [(p.step, p.critical) for p in threshold if math.isfinite(p.critical)]
    if len(points) < 4:
        points = [(p.step, p.edge) for p in threshold if math.isfinite(p.edge)]
    if len(points) < 4:
        return usual, math.nan
    begin = points[0][1]
    late = sorted(value for _, value in points[len(points) // 2 :])
    rise = late[len(late) // 2] / begin
    if rise < _RISEN:
        return usual, rise
    reached = next(step for step, value in points if value >= begin * (1 + _MOST * (rise - 1)))
    return min(max(1, reached), steps // 2), rise
