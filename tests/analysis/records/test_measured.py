"""Numbers with errors: how they are written, and what their bounds say."""

from __future__ import annotations

import math

import pytest

from analysis.records.measured import Bounded, Measured


def test_format_strings_write_the_error_beside_the_value() -> None:
    assert f"{Measured(value=1.23456, stderr=0.0123):.3g}" == "1.23 ± 0.0123"
    assert f"{Measured(value=2.0, stderr=0.0):.1f}" == "2.0"
    assert f"{Measured(value=2.0, stderr=math.nan):.1f}" == "2.0"
    assert f"{Bounded.between(1.0, 3.0):.2g}" == "2 ± 0.5"
    assert f"{Measured(value=2.0, stderr=0.5)}" == str(Measured(value=2.0, stderr=0.5)) == "2 ± 0.5"


def test_ratios_of_bounds_reach_from_the_least_to_the_most() -> None:
    ratio = Bounded.between(2.0, 4.0).over(Bounded.between(1.0, 2.0))
    assert (ratio.lower, ratio.upper) == (1.0, 4.0)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.value + 2 * ratio.stderr >= ratio.upper
    assert math.isnan(Bounded.between(2.0, 4.0).over(Bounded.between(0.0, 2.0)).value)
