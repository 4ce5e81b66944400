"""What a race of optimizers leaves: every training with its curve, what each search cost, and who is ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from analysis.records.measured import Measured
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["Axis", "Course", "CoursePoint", "Entrant", "Race", "RacePair", "Trait", "Verdict", "mean_over_seeds"]

Axis = Literal["budget", "metric", "steps", "seconds", "gradients"]
Verdict = Literal["ahead", "behind", "undecided"]

KEPT = 0.9
"""Share of the best fall of the loss that a rate keeps, to count as good as the best."""


@dataclass(frozen=True, kw_only=True, repr=False)
class CoursePoint(Result):
    """One look at a training, between two steps; what looks cost is not counted."""

    steps: int
    """Steps that were taken."""
    seconds: float
    """That they took: CPU time of one thread on a CPU, wall clock where a thread is not alone at work."""
    gradients: float
    """Their work in gradients of a training batch (forward and backward); NaN where it could not be counted."""
    loss: float
    """On all training data, in eval mode."""
    validation: float
    """Loss on the examples held out for the search; NaN where there are none."""
    metric: float
    """Test metric; NaN where there are no test data, or it was not looked at."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Trait(Result):
    """A property of the point where a training ended."""

    name: str
    """Of a sharpness measure; "noise" is the trace of the covariance of single examples' gradients."""
    value: float
    """In the units of the measure; NaN where it is not defined."""
    stderr: float
    """Error of the solver at this point."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Course(Result):
    """One training of an entrant."""

    entrant: str
    """Its name."""
    seed: int
    """0 is the seed of the search; those of the race count from 1."""
    lr: float
    """Its rate; NaN where it takes none."""
    share: float
    """Of the budget that it was given."""
    points: tuple[CoursePoint, ...]
    """From its start to its end, or to where it diverged."""
    diverged: str = ""
    """Why it counts as diverged; empty where it does not."""
    failure: str = ""
    """What made it impossible; empty where nothing did."""
    note: str = ""
    """What could not be measured of its end, and why."""
    seconds_per_gradient: float = math.nan
    """Of a gradient of a training batch, timed before the training; NaN where it was not."""
    traits: tuple[Trait, ...] = ()
    """Of its end."""

    @property
    def finished(self) -> bool:
        """Whether it has an end that counts."""
        return not self.diverged and not self.failure

    @property
    def end(self) -> CoursePoint:
        """Its last point."""
        return self.points[-1]

    def trait(self, name: str) -> Measured:
        """Return a property of its end; NaN where it was not measured."""
        for trait in self.traits:
            if trait.name == name:
                return Measured(value=trait.value, stderr=trait.stderr)
        return Measured(value=math.nan, stderr=math.nan)


@dataclass(frozen=True, kw_only=True, repr=False)
class Entrant(Result):
    """An optimizer with a schedule, and what was found out before it raced."""

    name: str
    """Of the entrant: the optimizer's, and the schedule's where that is not constant."""
    title: str
    """What it is: library, class, settings."""
    optimizer: str
    schedule: str
    lr: float
    """Rate that it raced with; NaN where it takes none, or none was found."""
    source: Literal["searched", "given", "default", "none"]
    """Where the rate is from; "none": it sets the length of its steps itself."""
    at_edge: bool
    """Whether the rate lies at the end of what was tried: a better one may lie beyond."""
    gradients_per_step: float
    """Work of a step in gradients of a training batch; NaN where it could not be counted."""
    evaluations_per_step: float
    """How often a step evaluates the loss."""
    failure: str
    """Why it did not race; empty where it did."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RacePair(Result):
    """Two entrants, over the seeds they share."""

    first: str
    second: str
    p: float
    """Of the test before the correction; 0 where chance has no part, 1 where there is nothing to tell apart."""
    test: Literal["paired t", "sign", "exact", "none"]
    """"paired t" over seeds; "sign" where a training diverged; "exact" where all seeds train alike."""
    difference: float
    """Mean over seeds of log(loss) of the first less the second (of the values, where one is not positive, or for
    accuracies); infinite where one diverged in more seeds."""
    verdict: Verdict
    """Of the first against the second, all pairs together at the level of the race."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Race(Result):
    """A race: entrants, all trainings, and which differences are beyond chance."""

    _figure = "plot_race"

    budget: float
    """Of each training, ..."""
    unit: Literal["steps", "seconds", "gradients"]
    """... in these."""
    entrants: tuple[Entrant, ...]
    courses: tuple[Course, ...]
    """All trainings, those of the search among them."""
    pairs: tuple[RacePair, ...]
    """By training loss at the end of the budget."""
    metric_pairs: tuple[RacePair, ...]
    """By test metric there; empty without test data. `race_pairs` compares at equal seconds and gradients."""
    seeds: int
    """Seeds of the race; none of them had a part in the search."""
    level: float
    """Family-wise error level over all pairs of one comparison."""
    metric: Literal["accuracy", "test loss", ""]
    """What is measured on test data."""
    resolution: float
    """Of the metric: an accuracy moves by whole test examples; 0 for a loss."""
    searched_by: str
    """What rates were chosen by."""
    start: str
    """Where trainings start."""
    batch_size: float
    """Examples in a batch, their mean where batches differ."""
    clock: str
    """What seconds are."""
    workers: int
    """Trainings at a time."""
    scale: Literal["log", "plain"]
    """On which losses are compared: as logarithms where all are positive."""
    floor: float
    """Losses below this, the rounding of that at the start, count as equal."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    def __getitem__(self, name: str) -> Entrant:
        """Return an entrant.

        Raises:
            InputError: if none has that name.
        """
        for entrant in self.entrants:
            if entrant.name == name:
                return entrant
        raise InputError(f"{name!r} did not enter; there are {', '.join(e.name for e in self.entrants)}.")

    def of(self, name: str) -> tuple[Course, ...]:
        """Return the trainings of an entrant that count, one a seed."""
        found = [c for c in self.courses if c.entrant == name and c.seed > 0]
        return tuple(sorted(found, key=lambda c: c.seed))

    def searches(self, name: str) -> tuple[Course, ...]:
        """Return the trainings of the search for its rate."""
        return tuple(c for c in self.courses if c.entrant == name and c.seed == 0)

    def diverged(self, name: str) -> float:
        """Return the share of its seeds that diverged."""
        own = self.of(name)
        return sum(bool(c.diverged) for c in own) / len(own) if own else math.nan

    def raced(self) -> tuple[str, ...]:
        """Return who has trainings, best first: by seeds that diverged, then by the mean of what is compared."""
        names = [e.name for e in self.entrants if any(not c.failure for c in self.of(e.name))]
        return tuple(sorted(names, key=lambda name: (self.diverged(name), self.final(name).value, name)))

    def final(self, name: str, quantity: str = "loss") -> Measured:
        """Return "loss" (its geometric mean on the scale "log"), "metric" or a trait, over the seeds that finished."""
        ends = [c for c in self.of(name) if c.finished]
        if quantity == "loss":
            return self._mean([c.end.loss for c in ends])
        return mean_over_seeds([c.end.metric if quantity == "metric" else c.trait(quantity).value for c in ends])

    def _mean(self, losses: list[float]) -> Measured:
        """Return the mean of losses; the geometric one where they are compared as logarithms."""
        if self.scale == "plain":
            return mean_over_seeds(losses)
        logs = mean_over_seeds([math.log(max(loss, self.floor)) for loss in losses if math.isfinite(loss)])
        value = math.exp(logs.value)
        return Measured(value=value, stderr=value * logs.stderr, dof=logs.dof)

    def common(self, by: Axis | str) -> float:
        """Return the steps, seconds or gradients of who got through the budget with the least; NaN for the others."""
        if by not in ("steps", "seconds", "gradients"):
            return math.nan
        means = [mean_over_seeds([getattr(c.end, by) for c in self.of(n) if c.finished]).value for n in self.raced()]
        return min((m for m in means if math.isfinite(m)), default=math.nan)

    def reached(self, course: Course, by: Axis | str, limit: float) -> float:
        """Return the test metric, or the training loss, of a training: at its end, or where it had spent so much.

        Between looks the loss is taken to move on a straight line; NaN where the amount was not counted.
        """
        if by in ("budget", "metric"):
            return float(course.end.metric if by == "metric" else course.end.loss)
        spent = [float(getattr(point, by)) for point in course.points]
        if not (math.isfinite(limit) and math.isfinite(spent[-1])):
            return math.nan
        for i, x in enumerate(spent):
            if x >= limit:
                before, after = course.points[max(0, i - 1)].loss, course.points[i].loss
                width = x - spent[max(0, i - 1)]
                return after if width <= 0 else after - (after - before) * (x - limit) / width
        return float(course.end.loss)

    def at(self, name: str, by: Axis) -> Measured:
        """Return what `reached` says over the seeds that finished, at the common amount."""
        limit = self.common(by)
        return self._mean([self.reached(c, by, limit) for c in self.of(name) if c.finished])

    def range_kept(self, name: str) -> tuple[float, float, bool]:
        """Return the least and the largest rate around the best one that keep nine tenths of its fall of the loss.

        Of the first round of the search, in which all rates have the same short part of the budget; NaN without one.
        The third says whether one of them is the last that was tried on its side: the range may be wider.
        """
        searched = [c for c in self.searches(name) if c.points or c.diverged]
        if not searched:
            return math.nan, math.nan, False
        first = sorted((c for c in searched if c.share == min(s.share for s in searched)), key=lambda c: c.lr)
        losses = [c.end.loss if c.finished else math.inf for c in first]
        best = losses.index(min(losses))
        if not math.isfinite(losses[best]):
            return math.nan, math.nan, False
        ceiling = losses[best] + (1 - KEPT) * (first[best].points[0].loss - losses[best])
        low = high = best
        while low > 0 and losses[low - 1] <= ceiling:
            low -= 1
        while high + 1 < len(losses) and losses[high + 1] <= ceiling:
            high += 1
        return first[low].lr, first[high].lr, low == 0 or high + 1 == len(losses)

    def leaders(self, pairs: tuple[RacePair, ...] | None = None) -> tuple[str, ...]:
        """Return whom nobody is ahead of, best first."""
        pairs = self.pairs if pairs is None else pairs
        beaten = {p.first for p in pairs if p.verdict == "behind"} | {p.second for p in pairs if p.verdict == "ahead"}
        return tuple(name for name in self.raced() if name not in beaten and self.diverged(name) < 1)

    def summary(self) -> dict[str, Any]:
        """Return the main numbers."""
        return {"leaders": self.leaders(), **{name: self.final(name).value for name in self.raced()}}


def mean_over_seeds(values: Iterable[float]) -> Measured:
    """Return the mean with its standard error over seeds; values that are not finite are left out."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return Measured(value=math.nan, stderr=math.nan)
    mean, n = sum(kept) / len(kept), len(kept)
    stderr = math.sqrt(sum((v - mean) ** 2 for v in kept) / (n * (n - 1))) if n > 1 else math.nan
    return Measured(value=mean, stderr=stderr, dof=max(1, n - 1))
