"""Counting coverage: what is inside, what claims to be exact, and the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage.cases import Case, Interval, measure
from benchmarks.coverage.report import coverage_table
from benchmarks.coverage.spectra import SPECTRA, make_matrix, rank_cases, trace_cases


def test_coverage_is_the_share_of_seeds_and_exact_answers_are_counted_apart() -> None:
    def run(seed: int) -> Interval:
        width = 0.0 if seed % 4 == 0 else 1.0
        return Interval.around(torch.tensor(2.0 * (seed % 4 == 1) + (seed == 4)), width)

    row = measure(Case("method", "data", torch.tensor(0.0, dtype=torch.float64), run, 1e-9), range(12))
    assert (row["coverage"], row["exact"], row["wrong"]) == pytest.approx((2 / 3, 1 / 4, 1))
    assert "| trace | 1 | 0 | 0 | 1 | 66.7 % | 1 |" in coverage_table(
        [{"quantity": "trace", "method": "method", "data": "data", "dtype": "float64", **row}]
    )


def test_cases_of_spectra_give_intervals() -> None:
    assert len(SPECTRA) == 9
    for name, eigenvalues in SPECTRA.items():
        assert float(make_matrix(name, torch.float64).trace()) == pytest.approx(float(eigenvalues.sum()))
    case = next(c for c in trace_cases(torch.float32) if c.data == "tiny")
    assert case.run(0).lower <= case.run(0).value <= case.run(0).upper
    rank = next(c for c in rank_cases(torch.float64) if c.data == "tiny")
    assert measure(rank, range(2))["wrong"] == 0
