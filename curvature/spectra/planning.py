"""What a spectrum will cost, before it is paid: products from what is asked for, seconds from a timed gradient.

One set of probes serves all quantities, so their costs do not add up: the cost is that of the most expensive quantity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from curvature.arguments import checked, checked_fields
from curvature.environment.cost import check_fits, current_memory, peak_memory, timed
from curvature.errors import InputError
from curvature.linalg.base.validate import check_confidence, check_square, working_dtype
from curvature.linalg.krylov.eigsh import block_penalty
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.results.record import Result
from curvature.spectra.product_cost import predicted_product

__all__ = ["PATIENCE", "SMALL", "PlannedCost", "Quantity", "SpectrumPlan", "plan"]

Quantity = Literal[
    "top", "bottom", "trace", "frobenius_norm", "moments", "density", "effective_dimension", "logdet", "layer_traces"
]
PATIENCE = 4
"""Eigenpairs that have not converged after the planned products are given so many times as much again."""
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
    num_groups: int = 16
    """Groups of batches for the error over the data, at most; 0 for none."""
    least_groups: int = 4
    """Fewest batches from which an error over the data is given."""
    fraction: float = 0.0
    """Share of all data of interest that the objective holds, where these are a random sample: errors over the data are
    then those of values over all of them, (1 - fraction)^(1/2) times those over other data of the same size."""

    def __post_init__(self) -> None:
        least = (("k", 0), ("num_bottom", 0), ("num_probes", 2), ("num_steps", 1), ("num_deflated", 0))
        for name, low in (*least, ("num_groups", 0), ("least_groups", 2)):
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
            needed = max(needed, _top_matvecs(min(self.k, n)) * block_penalty(self.k, width))
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
        return _CONTINUED * (self.num_bottom > 0) + _SEARCH * (self.confidence is not None)

    def all_entries(self, n: int) -> bool:
        """Return whether a matrix of size n is computed entry by entry."""
        return self.num_matvecs(n) == n

    def num_bytes(self, A: MatrixLike, sizes: Sequence[int]) -> int:
        """Return the bytes of the vectors held at once for matrices of these sizes, beside graphs and parameters."""
        itemsize = torch.empty(0, dtype=working_dtype(A)).element_size()
        held = 0
        for n in sizes:
            if self.all_entries(n):
                held += 3 * 8 * n * n
            else:
                basis = self.num_matvecs(n) + self.num_probes + self.k + self.num_bottom
                at_work = 5 * self.num_probes  # a block, its products and what these leave behind
                held += n * itemsize * (basis + max(at_work, self.num_search(n)))
        return held

    def check_memory(self, A: MatrixLike, sizes: Sequence[int], basis_device: torch.device | str | None) -> None:
        """Refuse what does not fit.

        Raises:
            InputError: with what is needed, what is free and what would fit.
        """
        if not sizes:
            raise InputError("blocks must hold one or more, got none; leave them out for all layers.")
        device = A.device if basis_device is None else torch.device(basis_device)
        needed = self.num_bytes(A, sizes)
        remedy = "plan fewer num_steps or num_probes"
        if device.type != "cpu":
            remedy += ', or hold the Krylov space elsewhere with basis_device="cpu"'
        check_fits(needed, device, f"a Krylov space of {self.num_matvecs(max(sizes))} vectors", remedy)


@dataclass(frozen=True, kw_only=True, repr=False)
class PlannedCost(Result):
    """What a plan will spend on one matrix, predicted from a timed gradient or, for plain matrices, product."""

    plan: SpectrumPlan
    """To be passed to `curvature.spectrum`."""
    quantities: tuple[str, ...]
    """What it yields."""
    num_matvecs: int
    """Products."""
    seconds_per_matvec: float
    """Wall-clock time of a product with one column, as one of a block, s."""
    seconds: float
    """Wall-clock time of all products, s."""
    peak_bytes: int
    """Largest memory of the process (on CUDA: of torch on the device), bytes."""


@checked
def plan(
    A: AnyMatrix,
    quantities: Collection[Quantity] = ("top", "bottom", "trace", "density"),
    *,
    matrix: MatrixName = "hessian",
    k: int = 10,
    num_bottom: int = 3,
    rtol: float = 1e-3,
    num_probes: int = 4,
    num_steps: int = 30,
    moment_order: int = 2,
) -> PlannedCost:
    """Say what the quantities will cost together, and how.

    Cost: two to six gradients and the graph of one batch, no product (`curvature.spectra.product_cost`); for a matrix
    that is not an objective's, two block products.

    Traces, norms and low moments need few steps; densities and what follows from them `num_steps`; eigenpairs as many
    as the spectra of trained networks take, which the truth may exceed.

    Args:
        A: the matrix.
        matrix: which one of an objective; see `as_matrix`.
        quantities: what is wanted.
        k: how many of the largest eigenpairs.
        num_bottom: how many of the smallest.
        rtol: residual of the largest, relative to the eigenvalue.
        num_probes: probes, at least 2.
        num_steps: block steps of a density.
        moment_order: highest power whose mean is wanted.

    Raises:
        InputError: for unknown quantities and values out of range.

    Example:
        >>> A = torch.diag(torch.linspace(0, 1, 1000))
        >>> plan(A, ["trace"]).num_matvecs, plan(A, ["trace", "density"]).num_matvecs
        (4, 120)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    unknown = sorted(set(quantities) - set(get_args(Quantity)))
    if unknown or not quantities:
        raise InputError(
            f"quantities must be some of {', '.join(get_args(Quantity))}, got {', '.join(unknown) or 'none'}."
        )
    steps = 1
    if {"density", "effective_dimension", "logdet"} & set(quantities):
        steps = num_steps
    elif "moments" in quantities:
        steps = max(1, math.ceil((moment_order + 1) / 2))
    made = SpectrumPlan(
        k=k if "top" in quantities else 0,
        num_bottom=num_bottom if "bottom" in quantities else 0,
        rtol=rtol,
        num_probes=num_probes,
        num_steps=steps,
    )
    width = min(num_probes, n)
    if isinstance(A, ObjectiveOperator):
        seconds, graphs = predicted_product(A, width)
    else:
        X, graphs = torch.full((n, width), n**-0.5, dtype=A.dtype, device=A.device), 0
        _ = A @ X
        _, seconds = timed(lambda: A @ X, A.device)
    spent = made.num_matvecs(n) + made.num_search(n)
    return PlannedCost(
        plan=made,
        quantities=tuple(quantities),
        num_matvecs=spent,
        seconds_per_matvec=seconds / width,
        seconds=spent * seconds / width,
        peak_bytes=max(peak_memory(A.device), current_memory(A.device) + graphs + made.num_bytes(A, [n])),
    )


def _top_matvecs(k: int) -> int:
    """Return about how many products the k largest pairs of a trained network take; the truth depends on gaps."""
    return 10 + 2 * k


def _bottom_matvecs(k: int) -> int:
    """Return the same for the k smallest, which lie close together and far below the norm."""
    return 20 + 8 * k
