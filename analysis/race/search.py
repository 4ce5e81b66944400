"""What an entrant does in a race: its work is counted, its rate searched by successive halving, then it trains.

A search begins with rates a factor of 10^(1/2) apart around a usual one, each for a short part of the budget. The
better half goes on, begun anew with twice the part, until the last two have had the whole budget; the better one races.
While the best of a round lies at an end of all that were tried, the next one beyond joins it. Losses are those of a
seed that does not race.

Reference: Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter optimization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from analysis.race.course import Count, Job
from analysis.race.plan import Entry, RacePlan
from analysis.race.results import Course

__all__ = ["Work", "budgets_of", "enter", "halvings"]

_RATIO = 10**0.5
_FURTHER = 4  # rates tried beyond an end, in a round

Answers = Sequence[Course | Count]
Enter = Generator[list[Job], Answers, "Work"]


@dataclass(frozen=True)
class Work:
    """What an entrant has done, but for its trainings."""

    lr: float
    source: Literal["searched", "given", "default", "none"]
    at_edge: bool
    count: Count
    failure: str


def halvings(rates: int) -> list[float]:
    """Return the shares of the budget that rates get, round by round; two are left in the last."""
    rounds = max(1, math.ceil(math.log2(rates)))
    return [2.0 ** -(rounds - 1 - r) for r in range(rounds)]


def budgets_of(rates: int) -> float:
    """Return the whole budgets that a search of so many rates takes, without further ones beyond its ends."""
    left, total = rates, 0.0
    for share in halvings(rates):
        total += left * share
        left = max(2, -(-left // 2))
    return total


def enter(entry: Entry, plan: RacePlan) -> Enter:
    """Yield what is to be done, take the answers, and return what came of it."""
    kind = entry.kind
    count = cast("Count", (yield [Job(entry, 0, entry.lr or kind.lr, 1.0, math.nan, counts=True)])[0])
    if count.failure:
        return Work(math.nan, "none", False, count, count.failure)

    def job(seed: int, lr: float | None, share: float = 1.0) -> Job:
        return Job(entry, seed, lr, share, count.per_evaluation)

    lr, source, at_edge = entry.lr or kind.lr, "given" if entry.lr else "default" if kind.lr else "none", False
    if plan.tune and kind.lr is not None and entry.lr is None:
        lr, at_edge, failure = yield from _search(kind.lr, plan, job)
        if lr is None:
            return Work(math.nan, "searched", False, count, failure)
        source = "searched"
    yield [job(seed, lr) for seed in range(1, plan.seeds + 1)]
    return Work(math.nan if lr is None else lr, source, at_edge, count, "")  # type: ignore[arg-type]  # one of these


def _search(
    usual: float, plan: RacePlan, job: Callable[..., Job]
) -> Generator[list[Job], Answers, tuple[float | None, bool, str]]:
    """Return the best rate, whether it is the last on its side of those tried, and why there is none."""
    tried: set[int] = set()
    scores: dict[int, float] = {}

    def score(answer: Course | Count) -> float:
        course = cast("Course", answer)
        if not course.finished or not course.points:
            return math.inf
        value = course.end.validation if plan.validation > 0 else course.end.loss
        return value if math.isfinite(value) else math.inf

    due = [i - plan.rates // 2 for i in range(plan.rates)]
    for share in halvings(plan.rates):
        scores, further = {}, 0
        keep = max(2, -(-len(due) // 2))
        while due:
            answers = yield [job(0, usual * _RATIO**k, share) for k in due]
            if not tried and all(cast("Course", a).failure for a in answers):
                return None, False, cast("Course", answers[0]).failure
            scores |= {k: score(a) for k, a in zip(due, answers, strict=True)}
            tried |= set(due)
            best = _best(scores)
            beyond = {min(tried): min(tried) - 1, max(tried): max(tried) + 1}
            due = [beyond[best]] if best in beyond and further < _FURTHER else []
            further += 1
        if not math.isfinite(min(scores.values())):
            return None, False, "every rate of its search diverged"
        due = sorted(sorted(scores, key=lambda k: (scores[k], k))[:keep])
    best = _best(scores)
    return usual * _RATIO**best, best in (min(tried), max(tried)), ""


def _best(losses: dict[int, float]) -> int:
    """Return the place of the least loss; of equal ones the least rate, so that what diverged never wins by order."""
    return min(losses, key=lambda k: (losses[k], k))
