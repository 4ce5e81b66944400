"""What a spectrum is to hold and how well, and what that takes in products and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvature.arguments import checked_fields
from curvature.environment.cost import ELSEWHERE, check_fits
from curvature.environment.memory import available_memory
from curvature.errors import InputError
from curvature.linalg.base.places import Place
from curvature.linalg.base.validate import check_confidence, working_dtype
from curvature.linalg.krylov._ritz_selection import expected_matvecs
from curvature.linalg.krylov.eigsh import block_penalty
from curvature.linop import MatrixLike
from curvature.spectra.basis_cost import block_seconds, num_together

__all__ = ["SMALL", "SpectrumPlan"]

_EXACT_IS_WORTH = 1.5
_SEARCH = 8  # products of a chain outside the Krylov space, on the spectra of trained networks
_CONTINUED = 50  # products with which the smallest pairs of trained networks go on beyond the plan
_CROWD = 10  # blocks work at the low end as for so many pairs: it is dense, and one vector gets no further either
SMALL = 1e-4
"""Smallest eigenvalues need not be known better than this, relative to the largest."""


@checked_fields
@dataclass(frozen=True, kw_only=True)
class SpectrumPlan:
    """What a spectrum is to hold and how well.

    A matrix with at most one and a half times as many columns as products planned is computed entry by entry: exact.

    Raises:
        InputError: for values out of range.
    """

    k: int = 10
    """Largest eigenpairs (all, if there are fewer); 0 for none."""
    num_bottom: int = 3
    """Smallest eigenpairs (all, if there are fewer); 0 for none."""
    rtol: float = 1e-3
    """Residual of the largest, relative to the eigenvalue; of the smallest, thirty times that."""
    num_probes: int = 4
    """Start vectors; standard errors fall as their square root."""
    num_steps: int = 30
    """Block steps at least: what is narrower than the spectrum over their number is not resolved."""
    num_deflated: int = 10
    """Largest pairs that are taken exactly, as far as they converge, whether asked for or not: less variance."""
    confidence: float | None = 0.99
    """Probability with which no eigenvalue beyond the pairs may be missed, as in `curvature.linalg.eigsh`; None to do
    without the products that show it. Pairs that are continued beyond the plan are not looked at: UNCERTIFIED."""
    patience: int = 4
    """Pairs that have not converged after the planned products are given so many times as many again, at either end; 0
    leaves them."""
    num_groups: int = 16
    """Groups of batches for the error over the data, at most; 0 for none."""
    least_groups: int = 4
    """Fewest batches from which an error over the data is given."""
    fraction: float = 0.0
    """Share of all data of interest that the objective holds, where these are a random sample: errors over the data are
    then those of values over all of them, (1 - fraction)^(1/2) times those over other data of the same size."""

    def __post_init__(self) -> None:
        least = (("k", 0), ("num_bottom", 0), ("num_probes", 2), ("num_steps", 1), ("num_deflated", 0))
        for name, low in (*least, ("patience", 0), ("num_groups", 0), ("least_groups", 2)):
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if not 0 < self.rtol <= 0.1:
            raise InputError(f"rtol must lie in (0, 0.1], got {self.rtol}.")
        check_confidence(self.confidence)
        if not 0 <= self.fraction <= 1:
            raise InputError(f"fraction must lie in [0, 1], got {self.fraction}.")

    @property
    def bottom_rtol(self) -> float:
        return min(0.1, 30 * self.rtol)

    def num_steps_for(self, n: int) -> int:
        """Return the block steps for a matrix of size n: more than `num_steps` where eigenpairs need them."""
        width = min(self.num_probes, n)
        needed = float(self.k + self.num_bottom + width)  # Ritz pairs must be there
        if self.k > 0:
            needed = max(needed, expected_matvecs(min(self.k, n)) * block_penalty(self.k, width))
        if self.num_bottom > 0:
            needed = max(needed, _bottom_matvecs(min(self.num_bottom, n)) * block_penalty(_CROWD, width))
        wanted = math.ceil(needed / width)
        return max(self.num_steps, wanted)

    def num_matvecs(self, n: int) -> int:
        """Return the products with a matrix of size n."""
        planned = min(self.num_probes, n) * self.num_steps_for(n)
        return n if n <= _EXACT_IS_WORTH * planned else planned

    def num_search(self, n: int) -> int:
        """Return about how many products come on top for a matrix of size n.

        The smallest pairs are continued, and it is shown that no eigenpair was missed.
        """
        if self.all_entries(n) or self.k + self.num_bottom == 0:
            return 0
        return _CONTINUED * (self.num_bottom > 0 and self.patience > 0) + _SEARCH * (self.confidence is not None)

    def all_entries(self, n: int) -> bool:
        """Return whether a matrix of size n is computed entry by entry."""
        return self.num_matvecs(n) == n

    def parts_of_bytes(self, A: MatrixLike, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of the bases held at once for matrices of these sizes, and of the vectors beside them."""
        return self.bytes_of(working_dtype(A).itemsize, sizes)

    def bytes_of(self, itemsize: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the same, for entries of so many bytes."""
        bases = others = 0
        for n in sizes:
            if self.all_entries(n):
                others += 3 * 8 * n * n
            else:
                bases += n * itemsize * (self.num_matvecs(n) + self.num_probes)
                at_work = 5 * self.num_probes  # a block, its products and what these leave behind
                others += n * itemsize * (self.k + self.num_bottom + at_work)
        return bases, others

    def seconds_of_bases(self, A: MatrixLike, sizes: Sequence[int], place: Place, num_batches: int = 0) -> float:
        """Return the seconds that bases for matrices of these sizes take beside products, for data in such batches."""
        groups = min(self.num_groups, num_batches) if num_batches >= self.least_groups else 0
        total = 0.0
        for n in sizes:
            if self.all_entries(n):
                continue
            width, dtype = min(self.num_probes, n), working_dtype(A)
            total += block_seconds(
                n,
                dtype,
                width=width,
                steps=self.num_matvecs(n) / width,
                singles=self.num_search(n),
                passes=-(-groups // num_together(n * width * dtype.itemsize)),
                place=place,
            )
        return total

    def num_bytes(self, A: MatrixLike, sizes: Sequence[int]) -> int:
        """Return the bytes of the vectors held at once for matrices of these sizes, beside graphs and parameters."""
        return sum(self.parts_of_bytes(A, sizes))

    def place(self, A: MatrixLike, sizes: Sequence[int]) -> Place:
        """Return where bases for matrices of these sizes are held: on A's device, or on disk where they do not fit."""
        return A.device if self.num_bytes(A, sizes) <= available_memory(A.device) else "disk"

    def check_memory(self, A: MatrixLike, sizes: Sequence[int], place: Place) -> None:
        """Refuse what does not fit.

        Raises:
            InputError: with what is needed, what is free and what would fit.
        """
        if not sizes:
            raise InputError("blocks must hold one or more, got none; leave them out for all layers.")
        bases, others = self.parts_of_bytes(A, sizes)
        space, remedy = (
            f"a Krylov space of {self.num_matvecs(max(sizes))} vectors",
            "plan fewer num_steps or num_probes",
        )
        if place == A.device:
            check_fits(bases + others, place, space, f"{remedy}; {ELSEWHERE}")
            return
        check_fits(bases, place, space, remedy)
        check_fits(others, A.device, f"what is held beside {space}", f"{remedy}, or ask for fewer pairs")


def _bottom_matvecs(k: int) -> int:
    """Return `expected_matvecs` for the k smallest pairs, which lie close together and far below the norm."""
    return 20 + 8 * k
