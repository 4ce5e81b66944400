"""The jackknife where its answer is known."""

from __future__ import annotations

import pytest
import torch

from curvature.errors import InputError
from curvature.results.jackknife import jackknife_stderr
from tests.matrices import F64, generator


def test_of_a_mean_over_equal_groups_it_is_the_standard_error_of_the_mean() -> None:
    x = torch.randn(12, 3, generator=generator(), dtype=F64)
    without = (x.sum(dim=0) - x) / 11
    found = jackknife_stderr(x.mean(dim=0), without, torch.full((12,), 1 / 12, dtype=F64))
    torch.testing.assert_close(found, x.std(dim=0) / 12**0.5)


def test_of_a_mean_over_unequal_groups_it_is_right_on_average() -> None:
    sizes = torch.tensor([5, 9, 3, 8, 10, 5])
    squares, means = [], []
    for seed in range(3000):
        x = torch.randn(40, generator=generator(seed), dtype=F64)
        sums = torch.stack([part.sum() for part in x.split(sizes.tolist())])
        without = (x.sum() - sums) / (40 - sizes)
        squares.append(float(jackknife_stderr(x.mean(), without, sizes / 40)) ** 2)
        means.append(float(x.mean()))
    assert sum(squares) / 3000 == pytest.approx(1 / 40, rel=0.04)
    assert float(torch.tensor(means).var()) == pytest.approx(1 / 40, rel=0.1)


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.4], [1.0, 0.0]])
def test_shares_that_are_none(shares: list[float]) -> None:
    with pytest.raises(InputError, match="shares must be two or more positive numbers that sum to 1"):
        jackknife_stderr(torch.ones(()), torch.ones(len(shares)), torch.tensor(shares))
