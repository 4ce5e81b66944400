"""What a spectrum will cost, before it is paid: products from what is asked for, seconds from a timed gradient.

One set of probes serves all quantities, so their costs do not add up: the cost is that of the most expensive quantity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from curvature.arguments import checked, checked_fields
from curvature.environment.cost import ELSEWHERE, check_fits, gibibytes, peak_memory, timed
from curvature.environment.memory import available_memory
from curvature.errors import InputError
from curvature.linalg.base.places import Place
from curvature.linalg.base.validate import check_confidence, check_count, check_square, working_dtype
from curvature.linalg.krylov.eigsh import block_penalty
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.results.record import Result
from curvature.spectra.product_cost import ProductCost, product_cost
from curvature.spectra.ways import Way, graph_choices, present_memory, ways_to_pairs

__all__ = ["SMALL", "PlannedCost", "Quantity", "SpectrumPlan", "plan"]

Quantity = Literal[
    "top", "bottom", "trace", "frobenius_norm", "moments", "density", "effective_dimension", "logdet", "layer_traces"
]
Whole = Literal["eigenpairs", "product", "layers"]
_EXACT_IS_WORTH = 1.5
_SEARCH = 8  # products of a chain outside the Krylov space, on the spectra of trained networks
_CONTINUED = 50  # products with which the smallest pairs of trained networks go on beyond the plan
_COMPARED = 3  # vectors that the first product of all holds, which compares lean layers with autograd, ...
_HEAP = 2  # ... and those that the heap of the process keeps meanwhile, in pieces
_OF_BLOCK = 0.7  # of a product: that with the block of a layer, on average
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
    """Pairs that have not converged after the planned products are given so many times as much again; 0 leaves them."""
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
        return _CONTINUED * (self.num_bottom > 0 and self.patience > 0) + _SEARCH * (self.confidence is not None)

    def all_entries(self, n: int) -> bool:
        """Return whether a matrix of size n is computed entry by entry."""
        return self.num_matvecs(n) == n

    def parts_of_bytes(self, A: MatrixLike, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of the bases held at once for matrices of these sizes, and of the vectors beside them."""
        itemsize = torch.empty(0, dtype=working_dtype(A)).element_size()
        bases = others = 0
        for n in sizes:
            if self.all_entries(n):
                others += 3 * 8 * n * n
            else:
                bases += n * itemsize * (self.num_matvecs(n) + self.num_probes)
                at_work = 5 * self.num_probes  # a block, its products and what these leave behind
                others += n * itemsize * (self.k + self.num_bottom + max(at_work, self.num_search(n)))
        return bases, others

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


@dataclass(frozen=True, kw_only=True, repr=False)
class PlannedCost(Result):
    """What a call will spend on one matrix, predicted from a timed gradient or, for plain matrices, product."""

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
    changes: dict[str, Any]
    """What the objective is to be changed in, for `Objective.replace`."""
    settings: dict[str, Any]
    """Keywords for the call."""
    plan: SpectrumPlan | None
    """To be passed to `curvature.spectrum`; None for eigenpairs and single products."""
    ways: tuple[Way, ...]
    """The other ways, and what they would cost, the fastest first."""


@checked
def plan(
    A: AnyMatrix,
    quantities: Collection[Quantity] | Whole = ("top", "bottom", "trace", "density"),
    *,
    matrix: MatrixName = "hessian",
    k: int = 10,
    num_bottom: int = 3,
    rtol: float = 1e-3,
    num_probes: int = 4,
    num_steps: int = 30,
    moment_order: int = 2,
    memory_limit: int | None = None,
) -> PlannedCost:
    """Say what the quantities will cost together, and how they are computed within a limit on memory.

    Cost: four gradients and the graph of one batch, no product (`curvature.spectra.product_cost`); for a matrix
    that is not an objective's, two block products. What was measured beside it: `benchmarks/memory`.

    Traces, norms and low moments need few steps; densities and what follows from them `num_steps`; eigenpairs as many
    as the spectra of trained networks take, which the truth may exceed.

    Args:
        A: the matrix.
        matrix: which one of an objective; see `as_matrix`.
        quantities: what is wanted of `spectrum`; or "eigenpairs", the k largest by `eigsh`; or "product"; or
            "layers", all of `layer_spectra`.
        k: how many of the largest eigenpairs.
        num_bottom: how many of the smallest.
        rtol: residual of the largest, relative to the eigenvalue.
        num_probes: probes, at least 2.
        num_steps: block steps of a density.
        moment_order: highest power whose mean is wanted.
        memory_limit: bytes that the process may hold, or torch on a device. The fastest way within it is chosen, among
            graphs kept or rebuilt, batches whole or in pieces, and bases that are shorter, narrower or on disk.

    Raises:
        InputError: for unknown quantities and values out of range, or if no way fits the limit.

    Examples:
        >>> A = torch.diag(torch.linspace(0, 1, 1000))
        >>> plan(A, ["trace"]).num_matvecs, plan(A, ["trace", "density"]).num_matvecs
        (4, 120)
        >>> plan(A, "eigenpairs", k=3).settings, plan(A, "eigenpairs", k=3).num_matvecs
        ({}, 31)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    names = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    unknown = sorted(set(names) - set(get_args(Quantity)))
    if quantities == "eigenpairs" or quantities == "product":
        made = None
    elif quantities == "layers":
        if not isinstance(A, ObjectiveOperator):
            raise InputError(f"layers are those of an objective; A must be one, or an operator of it, got {A!r:.80}.")
        made = _spectrum_plan(("top", "bottom", "density"), k, num_bottom, rtol, num_probes, num_steps, moment_order)
    elif unknown or not names:
        raise InputError(
            f"quantities must be some of {', '.join(get_args(Quantity))}, or 'eigenpairs', 'product' or 'layers', got "
            f"{', '.join(unknown) or 'none'}."
        )
    else:
        made = _spectrum_plan(names, k, num_bottom, rtol, num_probes, num_steps, moment_order)
    width = 1 if made is None else min(num_probes, n)
    cost, seconds = None, 0.0
    if isinstance(A, ObjectiveOperator):
        cost = product_cost(A)
    else:
        X = torch.full((n, width), n**-0.5, dtype=A.dtype, device=A.device)
        _ = A @ X
        _, seconds = timed(lambda: A @ X, A.device)
    if quantities == "eigenpairs":
        check_count("k", k, 1, n)
        ways = ways_to_pairs(A, k, cost, seconds)
    else:
        sizes = [n]
        if quantities == "layers" and isinstance(A, ObjectiveOperator):
            sizes = [block.num_params for block in A.objective.space.blocks]
        ways = _ways_to(made, A, sizes, cost, seconds / width, width)
    first, others = _chosen(ways, memory_limit)
    return PlannedCost(
        quantities=names,
        num_matvecs=first.num_matvecs,
        seconds_per_matvec=first.seconds / first.num_matvecs,
        seconds=first.seconds,
        peak_bytes=max(peak_memory(A.device), first.peak_bytes),
        changes=first.changes,
        settings=first.settings,
        plan=made,
        ways=others,
    )


def _spectrum_plan(
    names: Sequence[str], k: int, num_bottom: int, rtol: float, num_probes: int, num_steps: int, moment_order: int
) -> SpectrumPlan:
    steps = 1
    if {"density", "effective_dimension", "logdet"} & set(names):
        steps = num_steps
    elif "moments" in names:
        steps = max(1, math.ceil((moment_order + 1) / 2))
    return SpectrumPlan(
        k=k if "top" in names else 0,
        num_bottom=num_bottom if "bottom" in names else 0,
        rtol=rtol,
        num_probes=num_probes,
        num_steps=steps,
    )


def _ways_to(
    made: SpectrumPlan | None, A: MatrixLike, sizes: list[int], cost: ProductCost | None, seconds: float, width: int
) -> list[Way]:
    """Return the ways to spectra of matrices of these sizes side by side, or to one product without a plan."""
    n, present = int(A.shape[0]), present_memory(A.device)
    vector = n * working_dtype(A).itemsize
    counts = [1] if made is None else [made.num_matvecs(size) + made.num_search(size) for size in sizes]
    count, walks = sum(counts), max(counts) / width
    columns = count / walks * (1.0 if len(sizes) == 1 else _OF_BLOCK)
    found = []
    for changes, pieces, keep in graph_choices(cost):
        taken = count * seconds if cost is None else walks * cost.seconds(columns, pieces, keep)
        graphs = 0 if cost is None else cost.graphs(pieces, keep)
        work = vector if cost is None else cost.work(pieces)
        places: list[dict[str, Any]] = (
            [{}] if made is None or len(sizes) > 1 or made.all_entries(n) else [{}, {"basis_device": "disk"}]
        )
        for settings in places:
            basis, rest = (0, 0) if made is None else made.parts_of_bytes(A, sizes)
            held = graphs + work + rest + (0 if settings else basis)
            if made is None and cost is not None:
                held = max(held, (_COMPARED + _HEAP * (A.device.type == "cpu")) * vector)
            peak = present + held
            setup = 0.0 if cost is None or made is None else cost.setup
            found.append(Way(changes, settings, count, setup + taken, peak))
    return found


def _chosen(ways: Sequence[Way], memory_limit: int | None) -> tuple[Way, tuple[Way, ...]]:
    """Return the first way, or the fastest within a limit, and the others.

    Raises:
        InputError: if none fits.
    """
    by_time = sorted(ways, key=lambda way: way.seconds)
    first = ways[0]
    if memory_limit is not None and first.peak_bytes > memory_limit:
        fitting = [way for way in by_time if way.peak_bytes <= memory_limit]
        if not fitting:
            least = min(ways, key=lambda way: way.peak_bytes)
            how = {**least.changes, **least.settings} or "the settings as they are"
            raise InputError(
                f"no way fits into {gibibytes(memory_limit)}: the smallest takes {gibibytes(least.peak_bytes)}, with "
                f"{how}; ask for fewer pairs or probes, or for some of the parameters (params=)."
            )
        first = fitting[0]
    return first, tuple(way for way in by_time if way is not first)


def _top_matvecs(k: int) -> int:
    """Return about how many products the k largest pairs of a trained network take; the truth depends on gaps."""
    return 10 + 2 * k


def _bottom_matvecs(k: int) -> int:
    """Return the same for the k smallest, which lie close together and far below the norm."""
    return 20 + 8 * k
