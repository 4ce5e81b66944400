"""Intervals of means: against scipy, closed forms, and their coverage on samples whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from curvature.errors import InputError
from curvature.results.intervals import (
    combined_error,
    mean_interval,
    ratio_interval,
    skewness,
    spread_dof,
    tail_exponent,
)


def test_without_skewness_it_is_students_interval() -> None:
    expected = stats.t.interval(0.9, 7, loc=2.0, scale=0.5)
    assert mean_interval(2.0, 0.5, dof=7, confidence=0.9) == pytest.approx(expected)
    assert mean_interval(2.0, 0.5) == pytest.approx(stats.norm.interval(0.95, loc=2.0, scale=0.5))
    assert mean_interval(2.0, 0.5, dof=7, skewness=1e-7) == pytest.approx(mean_interval(2.0, 0.5, dof=7), rel=1e-6)
    assert mean_interval(2.0, 0.0, dof=7) == (2.0, 2.0)
    assert mean_interval(2.0, 0.5, dof=0) == (-math.inf, math.inf)
    assert all(math.isnan(end) for end in mean_interval(2.0, math.nan))
    with pytest.raises(InputError, match="between 0 and 1"):
        mean_interval(2.0, 0.5, confidence=1.0)


def test_the_ends_solve_halls_cubic() -> None:
    value, stderr, dof, g = 2.0, 0.5, 15, 1.7
    a, t = g / (3 * 16**0.5), float(stats.t.ppf(0.975, dof))
    low, high = mean_interval(value, stderr, dof=dof, skewness=g)
    for end, sign in ((low, 1), (high, -1)):
        T = (value - end) / stderr
        assert T + a * T**2 + a**2 * T**3 / 3 + a / 2 == pytest.approx(sign * t)
    assert high - value > value - low  # the tail that was missed lies above


@pytest.mark.parametrize(("k", "low"), [(2, 0.93), (3, 0.93), (4, 0.9), (8, 0.94), (16, 0.94), (64, 0.94)])
def test_means_of_squares_are_covered(k: int, low: float) -> None:
    """Squares of normal numbers: Student's interval covers 85, 83, 82, 85, 88 and 93 %."""
    g = torch.Generator().manual_seed(0)
    samples, hits = torch.randn(3000, k, generator=g, dtype=torch.float64).square(), 0
    for row in samples:
        value, stderr = float(row.mean()), float(row.std()) / k**0.5
        ends = mean_interval(value, stderr, dof=k - 1, skewness=float(skewness(row)))
        hits += ends[0] <= 1 <= ends[1]
    assert low < hits / 3000 < 0.965


def test_skewness_is_fishers() -> None:
    x = np.random.default_rng(0).exponential(size=12) - 0.5
    assert float(skewness(torch.tensor(x))) == pytest.approx(float(stats.skew(x, bias=False)))
    few = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)  # as squares have: twice the relative spread
    assert float(skewness(few)) == -float(skewness(-few)) == pytest.approx(2 * float(few.std() / few.mean()))
    assert float(skewness(1e6 + few, 1e6)) == pytest.approx(float(skewness(few)))  # a part that is known is no mean
    assert float(skewness(few[:2])) == pytest.approx(2 * 0.5**0.5 / 1.5)
    assert skewness(torch.tensor([1.0])) == skewness(torch.ones(5)) == 0.0
    assert skewness(torch.tensor([1.0, 2.0, math.inf])) == 0.0


@pytest.mark.parametrize("ratio", [1.0, 0.25, 0.0])
def test_differences_of_few_samples_keep_their_level(ratio: float) -> None:
    """Means of 4 samples of two variances: 1 % of null differences are beyond the 1 % point, 5 % beyond the 5 %."""
    g = np.random.default_rng(0)
    d, a, b = (
        g.standard_normal(20000) * (1 + ratio) ** 0.5,
        g.chisquare(3, 20000) / 3,
        ratio * g.chisquare(3, 20000) / 3,
    )
    errors = [combined_error([(x**0.5, 3.0), (y**0.5, 3.0)]) for x, y in zip(a, b, strict=True)]
    s, nu = np.array(errors).T
    p = 2 * stats.t.sf(np.abs(d) / s, nu)
    assert 0.045 < np.mean(p < 0.05) < 0.062
    assert 0.008 < np.mean(p < 0.01) < 0.016


def test_combined_errors_have_welchs_degrees_of_freedom() -> None:
    s, nu = combined_error([(3.0, 4.0), (4.0, 9.0)])
    assert (s, nu) == pytest.approx((5.0, 25**2 / (81 / 6 + 256 / 11) - 2))
    assert combined_error([(3.0, 4.0), (0.0, 1.0)]) == pytest.approx((3.0, 4.0))
    assert combined_error([(3.0, math.inf), (4.0, math.inf)]) == (5.0, math.inf)
    assert combined_error([]) == (0.0, math.inf)
    assert math.isnan(combined_error([(math.nan, 3.0), (1.0, 3.0)])[0])
    assert combined_error([(math.inf, 0.0), (1.0, 3.0)])[0] == math.inf
    assert combined_error([(1e-200, 3.0), (1e-200, 3.0)]) == pytest.approx((2**0.5 * 1e-200, 8.0))


@pytest.mark.parametrize("b", [3.0, 0.3, 0.0, -0.3, -0.01])
@pytest.mark.parametrize("variances", [(0.04, 0.1, 0.05), (4.0, -0.3, 0.05), (0.0, 0.0, 0.01)])
def test_a_ratio_interval_is_where_its_inequality_holds(b: float, variances: tuple[float, float, float]) -> None:
    R, (va, c, vb) = np.tan(np.linspace(0, np.pi / 2, 100_001)[:-1]), variances
    inside = R[(2 - R * b) ** 2 <= 4 * (va + c * R + vb * R**2)]
    low, high = ratio_interval(2.0, b, variances, 2.0)
    if len(inside):
        assert (low, min(high, R[-1])) == pytest.approx((inside[0], inside[-1]), rel=1e-3, abs=1e-3)
    else:
        assert low > 0
        assert high == math.inf


def test_tail_exponents_are_those_of_powers() -> None:
    x = torch.tensor(np.random.default_rng(0).pareto(1.5, 10_000) + 1)
    assert tail_exponent(x) == pytest.approx(1.5, rel=0.25)
    assert tail_exponent(torch.ones(9)) == tail_exponent(torch.zeros(9)) == math.inf


def test_the_spread_of_heavy_tails_has_few_degrees_of_freedom() -> None:
    """The variance of k draws scatters with twice its squared mean over its degrees of freedom."""
    normal = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for draws, low, high in ((normal, 0.7, 1.2), (normal.abs().sqrt(), 0.7, 1.5), (normal.exp(), 1.0, 20.0)):
        variances = draws.var(dim=1)
        truth = 2 * float(variances.mean()) ** 2 / float(variances.var())
        found = float(torch.tensor([spread_dof(row) for row in draws]).median())
        assert low <= found / truth <= high  # samples of heavy tails do not show how heavy these are
    assert found < 20
    assert math.isnan(spread_dof(torch.ones(3)))
    assert spread_dof(torch.ones(9)) == 8
