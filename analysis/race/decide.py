"""Who is ahead: paired tests over seeds, all pairs together at one level.

All entrants of a seed share initial weights and batches, so differences within seeds have less noise than between them.

Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from scipy.special import stdtr, stdtrit

from analysis.compare.measure import holm
from analysis.race.results import Axis, Course, Race, RacePair, Verdict
from curvature.errors import InputError

__all__ = ["decide", "least_ratio", "paired", "race_pairs"]

_ROUNDING = 1e-6  # relative: differences below are none
Test = Literal["paired t", "sign", "exact", "none"]


def race_pairs(race: Race, by: Axis | str = "budget") -> tuple[RacePair, ...]:
    """Compare all entrants of a race.

    Args:
        race: from `race_optimizers`.
        by: "budget": training loss at the end of the budget; "metric": test metric there; "seconds", "gradients" and
            "steps": training loss where the entrant that got through its budget with the least of them ended; or the
            name of a trait, as "top_eigenvalue": the smaller is ahead.

    Raises:
        InputError: for something that was not measured.
    """
    axes = get_args(Axis)
    if by == "metric" and not race.metric:
        raise InputError("this race has no test metric: its task has no test data.")
    traits = {trait.name for course in race.courses for trait in course.traits}
    if by not in axes and by not in traits:
        raise InputError(f"by must be one of {', '.join((*axes, *sorted(traits)))}, got {by!r}.")
    own = {name: {c.seed: c for c in race.of(name)} for name in race.raced()}
    limit = race.common(by)
    logs = _positive(race, by) if by in axes else True
    floor = race.floor if by in axes else 0.0

    def value(course: Course | None) -> float:
        if course is None or course.failure:
            return math.nan
        if course.diverged:
            return math.inf
        found = race.reached(course, by, limit) if by in axes else course.trait(by).value
        return (math.log(max(found, floor)) if max(found, floor) > 0 else math.nan) if logs else found

    return decide(
        {name: [value(courses.get(seed)) for seed in range(1, race.seeds + 1)] for name, courses in own.items()},
        level=race.level,
        lower_is_better=race.metric != "accuracy" or by != "metric",
        alike=[n for n, cs in own.items() if len(cs) > 1 and len({_outcome(c) for c in cs.values()}) == 1],
        rounding=_ROUNDING if logs or by == "metric" else race.floor,
        spread=race.resolution if by == "metric" else 0.0,
    )


def _positive(race: Race, by: Axis | str) -> bool:
    """Say whether what is compared are losses of which all have a logarithm."""
    if by != "metric":
        return race.scale == "log"
    ends = [c.end.metric for c in race.courses if c.seed and c.finished]
    return race.metric == "test loss" and all(end >= 0 for end in ends)


def _outcome(course: Course) -> tuple[object, ...]:
    return (course.end.loss if course.points else None, course.diverged, course.failure)


def paired(
    differences: Sequence[float], *, alike: bool, rounding: float = 0.0, spread: float = 0.0
) -> tuple[float, Test]:
    """Return the p-value of differences over seeds, and the test that it is of.

    Student's t of their mean where all are finite. Where one training of a seed diverged and the other did not, its
    difference is infinite: then the sign test over the seeds that differ, p = 2 sum_{i <= k} C(n, i) / 2^n with k the
    rarer sign. NaN, of seeds in which both diverged, tells nothing and is left out.

    Args:
        differences: one a seed.
        alike: all seeds train alike, as nothing is drawn at random: no chance is in a difference.
        rounding: differences of at most this are none.
        spread: of differences over seeds, at least: equal to the last bit, or to the last test example, is chance too.
    """
    told = [0.0 if abs(d) <= rounding else d for d in differences if not math.isnan(d)]
    n = len(told)
    if not any(told):
        return 1.0, "none"
    if alike:
        return 0.0, "exact"
    if any(math.isinf(d) for d in told):
        moved = [d for d in told if d != 0]
        rarer = min(sum(d > 0 for d in moved), sum(d < 0 for d in moved))
        tail = sum(math.comb(len(moved), i) for i in range(rarer + 1)) / 2 ** len(moved)
        return min(1.0, 2 * tail), "sign"
    if n < 2:
        return 1.0, "none"
    mean = sum(told) / n
    stderr = math.sqrt(sum((d - mean) ** 2 for d in told) / (n * (n - 1)))
    stderr = max(stderr, max(rounding, spread) / math.sqrt(n))
    if stderr == 0:
        return 1.0, "none"
    return max(min(float(2 * stdtr(n - 1, -abs(mean) / stderr)), math.nextafter(1.0, 0.0)), 5e-324), "paired t"


def decide(
    values: Mapping[str, Sequence[float]],
    *,
    level: float,
    lower_is_better: bool = True,
    alike: Collection[str] = (),
    rounding: float = _ROUNDING,
    spread: float = 0.0,
) -> tuple[RacePair, ...]:
    """Compare all pairs.

    Args:
        values: by entrant, one a seed; infinite where its training diverged, NaN where there is none.
        level: family-wise, by Holm's procedure.
        lower_is_better: whether the smaller value is ahead.
        alike: whose seeds all train alike; between two of them chance has no part.
        rounding: see `paired`.
        spread: see `paired`.
    """
    sign = 1.0 if lower_is_better else -1.0
    pairs, p_values, tests, differences = list(itertools.combinations(values, 2)), [], [], []
    for first, second in pairs:
        found = [_difference(a, b, sign) for a, b in zip(values[first], values[second], strict=True)]
        p, test = paired(found, alike=first in alike and second in alike, rounding=rounding, spread=spread)
        told = [d for d in found if not math.isnan(d) and abs(d) > rounding]
        finite = [d for d in found if math.isfinite(d)]
        score = sum((d > 0) - (d < 0) for d in told) if any(map(math.isinf, told)) else 0
        mean = sum(finite) / len(finite) if finite else 0.0
        p_values.append((p,))
        tests.append(test)
        differences.append(math.copysign(math.inf, score) if score else mean)  # of the signs that the test counts
    real = [row[0] for row in holm(p_values, [[] for _ in pairs], level)]
    return tuple(
        RacePair(first=a, second=b, p=p[0], test=test, difference=sign * d, verdict=_verdict(decided, d))
        for (a, b), p, test, d, decided in zip(pairs, p_values, tests, differences, real, strict=True)
    )


def _difference(a: float, b: float, sign: float) -> float:
    """Return how much worse the first is; what diverged is worse than anything, and alike among itself."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    if math.isinf(a) or math.isinf(b):
        return math.nan if math.isinf(a) and math.isinf(b) else math.inf if math.isinf(a) else -math.inf
    return sign * (a - b)


def _verdict(decided: bool, difference: float) -> Verdict:
    if not decided or difference == 0:
        return "undecided"
    return "behind" if difference > 0 else "ahead"


def least_ratio(seeds: int, pairs: int, level: float) -> float:
    """Return how many standard errors the first of so many differences must be, to be told from chance."""
    if seeds < 2 or pairs < 1:
        return math.inf
    return float(-stdtrit(seeds - 1, level / pairs / 2))
