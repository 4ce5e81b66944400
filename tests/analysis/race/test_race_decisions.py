"""Who is ahead: the tests against SciPy's and by hand, Holm over all pairs, and what is never best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from analysis.race.decide import decide, least_ratio, paired, race_pairs
from analysis.race.results import Course, CoursePoint, Entrant, Race, Trait
from analysis.race.told import findings_of
from curvature.errors import InputError


def test_the_paired_test_is_scipys() -> None:
    a, b = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).tolist()
    p, test = paired([x - y for x, y in zip(a, b, strict=True)], alike=False)
    assert (p, test) == (pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6), "paired t")
    p, _ = paired([x - y for x, y in zip(a, b, strict=True)] + [math.nan], alike=False)
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)  # both diverged: nothing is told


@pytest.mark.parametrize("signs", [(9, 0), (8, 1), (5, 4), (2, 0)])
def test_where_one_diverged_the_signs_decide(signs: tuple[int, int]) -> None:
    worse, better = signs
    p, test = paired([math.inf] * worse + [-0.5] * better + [0.0], alike=False)
    assert test == "sign"
    assert p == pytest.approx(min(1.0, stats.binomtest(better, worse + better).pvalue))


def test_ties_and_chance() -> None:
    assert paired([0.0, 0.0, 0.0], alike=False) == (1.0, "none")
    assert paired([0.0, 0.0, 0.0], alike=True) == (1.0, "none")
    assert paired([1e-7, 1e-7], alike=True, rounding=1e-6) == (1.0, "none")
    assert paired([0.1, 0.1], alike=True, rounding=1e-6) == (0.0, "exact")
    assert paired([0.3], alike=False) == (1.0, "none")
    assert paired([math.nan] * 3, alike=False) == (1.0, "none")
    p, _ = paired([0.1, 0.1, 0.1], alike=False, rounding=1e-6)  # equal to the last bit, over seeds that differ
    assert 0 < p < 1e-6
    one = 1 / 355  # an accuracy moves by whole examples: one more right in each of three seeds tells nothing
    p, _ = paired([one, one, one], alike=False, rounding=1e-6, spread=one)
    assert p == pytest.approx(2 * stats.t.sf(math.sqrt(3), 2))


def test_false_alarms_over_all_pairs_keep_the_level() -> None:
    g = torch.Generator().manual_seed(1)
    alarms = 0
    for _ in range(400):
        noise = torch.randn(5, 6, generator=g, dtype=torch.float64) + torch.randn(6, generator=g, dtype=torch.float64)
        pairs = decide({f"{i}": row.tolist() for i, row in enumerate(noise)}, level=0.1)
        alarms += any(pair.verdict != "undecided" for pair in pairs)
    assert alarms <= 40 + 4 * math.sqrt(400 * 0.1 * 0.9)


def test_holm_and_directions_by_hand() -> None:
    values = {"a": [1.0, 1.1, 0.9, 1.0], "b": [2.0, 2.2, 1.9, 2.0], "c": [2.1, 2.0, 2.0, 2.2], "d": [math.inf] * 4}
    found = {(p.first, p.second): p for p in decide(values, level=0.05)}
    assert found["a", "b"].verdict == found["a", "c"].verdict == "ahead"
    assert found["b", "c"].verdict == "undecided"
    assert found["a", "d"].p == pytest.approx(0.125)  # 2 / 2^4: four seeds cannot decide by signs
    assert found["a", "d"].verdict == "undecided"
    assert found["a", "d"].difference == -math.inf
    turned = {(p.first, p.second): p for p in decide(values, level=0.05, lower_is_better=False)}
    assert turned["a", "b"].verdict == "behind"
    assert turned["a", "d"].difference == math.inf  # what diverged is worse all the same
    many = decide({f"{i}": [float(i)] * 12 for i in range(3)} | {"gone": [math.inf] * 12}, level=0.05)
    assert {p.verdict for p in many if p.second == "gone"} == {"ahead"}
    assert least_ratio(4, 1, 0.05) == pytest.approx(stats.t.ppf(0.975, 3))
    assert least_ratio(1, 3, 0.05) == math.inf


def race(losses: dict[str, list[float]], **changes: Any) -> Race:
    """Return a race of these losses at the end; NaN diverged."""
    courses = []
    for name, ends in losses.items():
        for seed, loss in enumerate(ends, start=1):
            rate = 2.0 if name == "slow" else 1.0  # seconds and gradients a step
            points = tuple(
                CoursePoint(steps=s, seconds=rate * s, gradients=rate * s, loss=x, validation=math.nan, metric=1 / x)
                for s, x in ((0, 8.0), (5, (8 + loss) / 2), (10, loss))
            )
            courses.append(
                Course(
                    entrant=name,
                    seed=seed,
                    lr=0.1,
                    share=1.0,
                    points=points,
                    diverged="at step 10" if math.isnan(loss) else "",
                )
            )
    entrants = tuple(
        Entrant(
            name=name,
            title=name,
            optimizer=name,
            schedule="constant",
            lr=0.1,
            source="given",
            at_edge=False,
            gradients_per_step=1.0,
            evaluations_per_step=1.0,
            failure="",
        )
        for name in losses
    )
    found = Race(
        budget=10,
        unit="steps",
        entrants=entrants,
        courses=tuple(courses),
        pairs=(),
        metric_pairs=(),
        seeds=len(next(iter(losses.values()))),
        level=0.05,
        metric="accuracy",
        resolution=0.01,
        searched_by="training loss",
        start="drawn by the seed",
        batch_size=1.0,
        clock="wall clock",
        workers=1,
        scale="log",
        floor=1e-6,
    )
    return replace(found, **{"pairs": race_pairs(found), "metric_pairs": race_pairs(found, "metric"), **changes})


def test_equal_steps_are_not_equal_time() -> None:
    found = race({"slow": [1.0, 1.1, 1.2, 0.9], "quick": [2.0, 2.1, 2.3, 1.9]})
    assert found.raced() == ("slow", "quick")
    assert found.leaders() == ("slow",)
    assert found.common("seconds") == 10.0
    assert found.at("slow", "seconds").value == pytest.approx(
        math.exp(sum(math.log((8 + x) / 2) for x in (1.0, 1.1, 1.2, 0.9)) / 4)
    )
    assert found.leaders(race_pairs(found, "seconds")) == ("quick",)
    assert found.leaders(race_pairs(found, "gradients")) == ("quick",)
    assert found.leaders(found.metric_pairs) == ("slow",)
    plain = race({"a": [1.0, 2.0], "b": [2.0, 3.0]}, metric="")
    with pytest.raises(InputError, match="no test metric"):
        race_pairs(plain, "metric")


def test_traits_are_compared_too() -> None:
    found = race({"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 2.2]})
    flat = {"a": 5.0, "b": 50.0}
    courses = tuple(
        replace(c, traits=(Trait(name="top_eigenvalue", value=flat[c.entrant] * (1 + 0.01 * c.seed), stderr=0.0),))
        for c in found.courses
    )
    found = replace(found, courses=courses)
    assert found.leaders(race_pairs(found, "top_eigenvalue")) == ("a",)
    with pytest.raises(InputError, match=r"by must be one of budget, metric, .* top_eigenvalue, got 'trace'"):
        race_pairs(found, "trace")


def test_ahead_of_some_is_not_ahead_of_all() -> None:
    found = race({"a": [1.0, 1.02, 0.99, 1.01], "b": [1.0, 3.0, 0.9, 2.0], "c": [8.0, 8.1, 8.2, 7.9]})
    assert found.leaders() == ("a", "b")
    assert "Undecided but for c, which is behind." in findings_of(found)[0].answer
    tried = replace(
        found, pairs=tuple(replace(p, verdict="behind" if p.first == "b" else p.verdict) for p in found.pairs)
    )
    assert tried.leaders() == ("a",)
    assert findings_of(tried)[0].answer.startswith("a is ahead of 1 of 2, and nobody of it")


def test_what_diverged_is_never_first() -> None:
    found = race({"lost": [1e-5, math.nan, 1e-5, 1e-5], "gone": [math.nan] * 4, "steady": [1.0, 1.1, 1.2, 0.9]})
    assert found.raced() == ("steady", "lost", "gone")
    assert found.diverged("lost") == 0.25
    assert "gone" not in found.leaders()
    assert found.final("lost").value == pytest.approx(1e-5)
    assert math.isnan(found.final("gone").value)
    pair = next(p for p in found.pairs if {p.first, p.second} == {"lost", "steady"})
    assert (pair.test, pair.verdict) == ("sign", "undecided")


def test_losses_below_rounding_are_equal() -> None:
    found = race({"a": [1e-9, 2e-9, 1e-8], "b": [1e-7, 3e-8, 1e-7]})
    assert found.pairs[0].p == 1.0
    assert found.final("a").value == pytest.approx(1e-6)


def test_who_is_ahead_is_what_the_signs_say() -> None:
    """Better in eleven seeds of twelve, and diverged in one."""
    (pair,) = decide({"a": [math.inf] + [0.1] * 11, "b": [1 + 0.01 * i for i in range(12)]}, level=0.05)
    assert (pair.test, pair.verdict) == ("sign", "ahead")
    assert pair.difference == -math.inf


def test_test_losses_are_compared_as_losses() -> None:
    """The same numbers, small, as training and as test loss."""
    losses = {"a": [5e-10, 6e-10, 4e-10, 5e-10], "b": [2e-8, 3e-8, 2e-8, 2.5e-8]}
    found = replace(race(losses), floor=1e-12)
    courses = tuple(replace(c, points=tuple(replace(p, metric=p.loss) for p in c.points)) for c in found.courses)
    found = replace(found, courses=courses, metric="test loss")
    (own,), (test,) = race_pairs(found), race_pairs(found, "metric")
    assert (own.verdict, own.p) == (test.verdict, test.p)
    assert own.verdict == "ahead"
