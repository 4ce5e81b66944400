"""Line searches and damping rules on functions of one variable whose answers are known."""

from __future__ import annotations

import math

import pytest

from curvature.errors import InputError
from optimizers.newton.damping import CubicRule, DampingRule, RadiusRule, reduction_ratio
from optimizers.newton.line_search import Armijo, Grid, Line, StrongWolfe

FUNCTIONS = {  # phi, phi'
    "parabola": (lambda t: (t - 3.0) ** 2, lambda t: 2 * (t - 3.0)),
    "steep": (
        lambda t: math.cosh(4 * t - 2) if t < 100 else math.inf,
        lambda t: 4 * math.sinh(4 * t - 2) if t < 100 else math.inf,
    ),
    "more-thuente-1": (lambda t: -t / (t**2 + 2), lambda t: (t**2 - 2) / (t**2 + 2) ** 2),
    "log barrier": (
        lambda t: 2 * t - math.log(1 - t) - 9 * t if t < 1 else math.nan,
        lambda t: -7 + 1 / (1 - t) if t < 1 else math.nan,
    ),
}


def line(name: str) -> Line:
    phi, slope = FUNCTIONS[name]
    return Line(value=phi, value_and_slope=lambda t: (phi(t), slope(t)), start=phi(0.0), slope=slope(0.0))


@pytest.mark.parametrize("initial", [1e-3, 0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strong_wolfe_conditions_hold(name: str, initial: float) -> None:
    phi, slope = FUNCTIONS[name]
    found = StrongWolfe(flatness=0.1)(line(name), initial)
    assert found.success
    assert found.value == phi(found.step) <= phi(0.0) + 1e-4 * found.step * slope(0.0)
    assert abs(slope(found.step)) <= 0.1 * abs(slope(0.0))
    assert found.num_evaluations <= 25


@pytest.mark.parametrize("initial", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_armijo_condition_holds(name: str, initial: float) -> None:
    phi, slope = FUNCTIONS[name]
    found = Armijo(decrease=0.1)(line(name), initial)
    assert found.success
    assert found.value == phi(found.step) <= phi(0.0) + 0.1 * found.step * slope(0.0)


def test_searches_find_the_minimum_of_a_parabola() -> None:
    assert Armijo(decrease=0.4)(line("parabola"), 12.0).step == 3.0
    assert abs(StrongWolfe(decrease=1e-4, flatness=1e-3)(line("parabola"), 0.7).step - 3.0) < 1e-2
    assert Grid(num_steps=12)(line("parabola"), 24.0).step == 3.0


def test_negative_curvature_is_followed_as_long_as_it_pays() -> None:
    """phi = cos t - 1 from t = 0: slope 0, curvature -1, minimum at pi."""
    start = Line(value=lambda t: math.cos(t) - 1, start=0.0, slope=0.0, curvature=-1.0)
    found = Armijo()(start, 0.1)
    assert 1.6 <= found.step <= 3.2
    assert Armijo(expand=1.0)(start, 0.1).step == 0.1


@pytest.mark.parametrize("search", [Armijo(max_evaluations=5), StrongWolfe(max_evaluations=5), Grid(num_steps=5)])
def test_what_cannot_fall_is_told(search: Armijo | StrongWolfe | Grid) -> None:
    calls = []

    def value(t: float) -> float:
        calls.append(t)
        return 1.0 + abs(t)

    rising = Line(value=value, value_and_slope=lambda t: (value(t), 1.0), start=1.0, slope=-1.0)
    found = search(rising, 1.0)
    assert (found.step, found.value, found.success, len(calls)) == (0.0, 1.0, False, 5)
    assert "no decrease" in found.message


@pytest.mark.parametrize("search", [Armijo(), StrongWolfe()])
def test_uphill_is_refused_without_evaluations(search: Armijo | StrongWolfe) -> None:
    def value(_: float) -> float:
        raise AssertionError

    found = search(Line(value=value, value_and_slope=lambda t: (value(t), 1.0), start=0.0, slope=1.0), 1.0)
    assert (found.step, found.num_evaluations, found.success) == (0.0, 0, False)
    assert "slope" in found.message


def test_settings_out_of_range() -> None:
    for make in (
        lambda: Armijo(decrease=0.0),
        lambda: Armijo(shrink=0.01),
        lambda: StrongWolfe(decrease=0.5, flatness=0.1),
        lambda: Grid(shrink=1.0),
        lambda: DampingRule(low=0.9),
        lambda: RadiusRule(shrink=2.0),
        lambda: CubicRule(increase=1.0),
    ):
        with pytest.raises(InputError, match="needs"):
            make()
    with pytest.raises(InputError, match="slopes"):
        StrongWolfe()(Line(value=abs, start=1.0, slope=-1.0), 1.0)


def test_rules() -> None:
    assert DampingRule(minimum=0.5)(0.6, 1.0) == 0.5
    assert DampingRule(maximum=2.0)(1.9, -math.inf) == 2.0
    assert DampingRule()(4.0, math.nan) == 6.0
    assert RadiusRule()(1.0, -math.inf, 1.0) == 0.25
    assert RadiusRule(maximum=1.5)(1.0, 1.0, 1.0) == 1.5
    assert (CubicRule()(1.0, 0.95), CubicRule()(1.0, 0.5), CubicRule()(1.0, 0.0)) == (0.5, 1.0, 2.0)


def test_ratio() -> None:
    assert reduction_ratio(5.0, 4.0, 2.0, 1e-16) == pytest.approx(0.5)
    assert reduction_ratio(5.0, math.nan, 2.0, 1e-16) == -math.inf
    assert reduction_ratio(1e6, 1e6 + 1e-10, 1e-20, 1e-15) == pytest.approx(1.0, rel=0.1)  # rounding, not a failure
    assert reduction_ratio(0.0, 1.0, 0.0, 1e-16) == -math.inf
