"""What comparing models returns: one row a number, with the error of each difference and what it amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from analysis.records.measured import Measured
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["Compared", "Comparison", "Verdict"]

Verdict = Literal["real", "on these data", "not told apart", "unknown"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Compared(Result):
    """One number of several models; the first is what others are compared with."""

    name: str
    """What it is."""
    unit: str
    """Of the values."""
    values: tuple[Measured, ...]
    """Of each model, in their order; NaN where it was not measured."""
    p_solver: tuple[float, ...]
    """Of each model but the first: how likely so large a difference is from the errors of the solver alone; NaN where
    these are not known."""
    p_data: tuple[float, ...]
    """The same from the errors of the solver and over other data; NaN where these are not known."""
    verdicts: tuple[Verdict, ...]
    """Of each model but the first, at the family-wise level of the comparison: "real" is more than other data would
    move either, "on these data" more than the solver's errors."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each value over the first; NaN where that is 0 or of another sign."""
        first = self.values[0].value
        return tuple(m.value / first if first * m.value > 0 else math.nan for m in self.values)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Several models, number by number."""

    _figure = "plot_comparison"

    names: tuple[str, ...]
    """Of the models; the first is what others are compared with."""
    rows: tuple[Compared, ...]
    """In the order of the first model's numbers."""
    level: float
    """Family-wise error level over all rows and models (Holm's procedure)."""
    same_data: bool | None
    """Whether all were measured on the same data; None if not known."""
    overlaps: Tensor | None
    """(m, m), overlap of the spaces that the largest eigenvectors span, 0 to 1; None if there are none."""
    notes: tuple[str, ...]
    """What a reader should know."""

    def __getitem__(self, name: str) -> Compared:
        """Return the row of a number.

        Raises:
            InputError: if it was not compared.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"{name!r} was not compared; there are {', '.join(row.name for row in self.rows)}.")
