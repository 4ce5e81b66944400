"""Counting how often intervals cover: a case of `bench_coverage`, and the row that it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Interval", "measure"]


@dataclass(frozen=True)
class Interval:
    """What one seed gives: a value with a nominal 95 % interval, of the truth's shape."""

    value: Tensor
    lower: Tensor
    upper: Tensor
    products: int = 0
    """That were spent; 0 where there are none."""
    warned: bool = False
    """Whether the result says that its interval may not hold: by a status, or in a note."""

    @classmethod
    def around(cls, value: Tensor, half_width: Tensor | float, *, products: int = 0, warned: bool = False) -> Interval:
        """Return value +- half_width."""
        value = value.double()
        return cls(value, value - half_width, value + half_width, products, warned)

    @classmethod
    def between(cls, value: float, ends: tuple[float, float], *, products: int = 0, warned: bool = False) -> Interval:
        """Return a number between two ends."""
        low, high = (torch.tensor(end, dtype=torch.float64) for end in ends)
        return cls(torch.tensor(value, dtype=torch.float64), low, high, products, warned)


@dataclass(frozen=True)
class Case:
    """One quantity by one method on one set of data."""

    method: str
    """Method and settings, as the row shows them."""
    data: str
    """Spectrum or data."""
    truth: Tensor
    """Any shape, float64."""
    run: Callable[[int], Interval]
    """From a seed to the interval."""
    rounding: float
    """How far rounding alone may move an answer."""


def measure(case: Case, seeds: Sequence[int]) -> dict[str, Any]:
    """Return counts over these seeds: coverage, exact answers, bias and root mean square error.

    `coverage` is the share among answers that do not claim to be exact, NaN if all do; `wrong` counts those that claim
    it and are not. `bias` is in standard errors of the mean error over the seeds, the largest over the entries.
    """
    answers = [case.run(seed) for seed in seeds]
    value, lower, upper = (
        torch.stack([getattr(answer, name).double() for answer in answers]) for name in ("value", "lower", "upper")
    )
    covers = (lower - case.rounding <= case.truth) & (case.truth <= upper + case.rounding)
    exact = (upper - lower == 0) & (value == value)
    error = value - case.truth
    spread = error.std(dim=0) / len(seeds) ** 0.5
    bias = torch.where(spread > case.rounding, error.mean(dim=0) / spread, 0)
    return {
        "seeds": len(seeds),
        "coverage": float(covers[~exact].double().mean()),
        "exact": float(exact.double().mean()),
        "wrong": int((exact & ~covers).sum()),
        "warned": sum(answer.warned for answer in answers) / len(seeds),
        "bias": float(bias.flatten()[bias.abs().argmax()]),
        "error": float(error.square().mean().sqrt()),
        "half_width": float((upper - lower).nanmean() / 2),
        "products": sum(answer.products for answer in answers) / len(seeds),
    }
