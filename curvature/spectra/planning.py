"""What a spectrum will cost, before it is paid: products from what is asked for, seconds from a timed gradient.

One set of probes serves all quantities, so their costs do not add up: the cost is that of the most expensive quantity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch

from curvature.arguments import checked
from curvature.environment.cost import gibibytes, peak_memory, timed
from curvature.errors import InputError
from curvature.linalg.base.validate import check_count, check_square, working_dtype
from curvature.linalg.krylov._ritz_selection import basis_size
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.results.record import Result
from curvature.spectra.many_devices import Cluster, ModelSize, RankCost, rank_cost
from curvature.spectra.product_cost import ProductCost, product_cost
from curvature.spectra.spectrum_plan import SpectrumPlan
from curvature.spectra.ways import Way, graph_choices, matvecs_of_pairs, present_memory, ways_to_pairs

__all__ = ["PlannedCost", "Quantity", "plan"]

Quantity = Literal[
    "top", "bottom", "trace", "frobenius_norm", "moments", "density", "effective_dimension", "logdet", "layer_traces"
]
Whole = Literal["eigenpairs", "product", "layers"]
_COMPARED = 3  # vectors that the first product of all holds, which compares lean layers with autograd, ...
_HEAP = 2  # ... and those that the heap of the process keeps meanwhile, in pieces
_OF_BLOCK = 0.7  # of a product: that with the block of a layer, on average


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


@overload
def plan(
    A: AnyMatrix,
    quantities: Collection[Quantity] | Whole = ...,
    *,
    matrix: MatrixName = ...,
    k: int = ...,
    num_bottom: int = ...,
    rtol: float = ...,
    num_probes: int = ...,
    num_steps: int = ...,
    moment_order: int = ...,
    memory_limit: int | None = ...,
) -> PlannedCost: ...
@overload
def plan(
    A: ModelSize,
    quantities: Collection[Quantity] | Whole = ...,
    *,
    k: int = ...,
    num_bottom: int = ...,
    rtol: float = ...,
    num_probes: int = ...,
    num_steps: int = ...,
    moment_order: int = ...,
    world_size: int,
    cluster: Cluster | None = ...,
) -> RankCost: ...
@checked
def plan(
    A: AnyMatrix | ModelSize,
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
    world_size: int | None = None,
    cluster: Cluster | None = None,
) -> PlannedCost | RankCost:
    """Say what the quantities will cost together, and how they are computed within a limit on memory.

    Cost: four gradients and the graph of one batch, no product (`curvature.spectra.product_cost`); for a matrix
    that is not an objective's, two block products. What was measured beside it: `benchmarks/memory`.

    With `world_size`, the price on each of so many ranks is computed from sizes: memory, bytes moved and seconds
    (`curvature.spectra.many_devices`); nothing is run, and the model may lie on the meta device.

    Traces, norms and low moments need few steps; densities and what follows from them `num_steps`. Eigenpairs are
    planned for random weights, of which six networks took half to twice as many products; trained networks take a
    third to a half of them as a rule. It is gaps that matter, and they are not known before.

    Args:
        A: the matrix; with `world_size` a `ModelSize`.
        matrix: which one of an objective; see `as_matrix`. With `world_size` it is the Hessian.
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
        world_size: ranks over which parameters and data are spread.
        cluster: memory and speeds of a rank.

    Raises:
        InputError: for unknown quantities and values out of range, or if no way fits the limit.

    Examples:
        >>> A = torch.diag(torch.linspace(0, 1, 1000))
        >>> plan(A, ["trace"]).num_matvecs, plan(A, ["trace", "density"]).num_matvecs
        (4, 120)
        >>> plan(A, "eigenpairs", k=3).settings, plan(A, "eigenpairs", k=3).num_matvecs
        ({}, 42)
        >>> size = ModelSize(
        ...     num_params=7 * 10**9, largest_module=2 * 10**8, num_modules=300, tokens=10**6, batch_tokens=4096
        ... )
        >>> cost = plan(size, "eigenpairs", k=1, world_size=64)
        >>> cost.route, cost.rank_bytes // 10**9, cost.bytes_per_matvec // 10**9
        ('module by module', 16, 771)
    """
    if isinstance(A, ModelSize) != (world_size is not None):
        raise InputError(
            "world_size= goes with the size of a model: plan(ModelSize.of(model, tokens=..., batch_tokens=...), ..., "
            "world_size=64); without it, A is a matrix or an objective."
        )
    names = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    unknown = sorted(set(names) - set(get_args(Quantity)))
    if quantities == "eigenpairs" or quantities == "product":
        made = None
    elif quantities == "layers":
        made = _spectrum_plan(("top", "bottom", "density"), k, num_bottom, rtol, num_probes, num_steps, moment_order)
    elif unknown or not names:
        raise InputError(
            f"quantities must be some of {', '.join(get_args(Quantity))}, or 'eigenpairs', 'product' or 'layers', got "
            f"{', '.join(unknown) or 'none'}."
        )
    else:
        made = _spectrum_plan(names, k, num_bottom, rtol, num_probes, num_steps, moment_order)
    if isinstance(A, ModelSize):
        if quantities == "layers":
            raise InputError("layers are planned for an objective, without world_size=.")
        assert world_size is not None
        count, basis, others = _vectors_of(made, A, k if quantities == "eigenpairs" else 0)
        width = 1 if made is None else min(num_probes, A.num_params)
        return rank_cost(
            A,
            num_matvecs=count,
            num_basis=basis,
            others=others,
            width=width,
            world_size=world_size,
            cluster=cluster,
        )
    A = as_matrix(A, matrix)
    n = check_square(A)
    if quantities == "layers" and not isinstance(A, ObjectiveOperator):
        raise InputError(f"layers are those of an objective; A must be one, or an operator of it, got {A!r:.80}.")
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
    first, rest = _chosen(ways, memory_limit)
    return PlannedCost(
        quantities=names,
        num_matvecs=first.num_matvecs,
        seconds_per_matvec=first.seconds / first.num_matvecs,
        seconds=first.seconds,
        peak_bytes=max(peak_memory(A.device), first.peak_bytes),
        changes=first.changes,
        settings=first.settings,
        plan=made,
        ways=rest,
    )


def _vectors_of(made: SpectrumPlan | None, size: ModelSize, k: int) -> tuple[int, int, int]:
    """Return the products, the vectors of the basis, and those beside it, for a model of this size."""
    n = size.num_params
    if made is None:
        return (1, 0, 0) if k == 0 else (matvecs_of_pairs(n, k), min(n, basis_size(k) + 1), k)
    bases, others = (math.ceil(part / (n * size.dtype.itemsize)) for part in made.bytes_of(size.dtype.itemsize, [n]))
    return made.num_matvecs(n) + made.num_search(n), bases, others


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
            basis, rest, beside = 0, 0, 0.0
            if made is not None:
                basis, rest = made.parts_of_bytes(A, sizes)
                batches = 0 if cost is None else cost.num_batches * pieces
                beside = made.seconds_of_bases(A, sizes, "disk" if settings else A.device, batches)
            held = graphs + work + rest + (0 if settings else basis)
            if made is None and cost is not None:
                held = max(held, (_COMPARED + _HEAP * (A.device.type == "cpu")) * vector)
            peak = present + held
            setup = 0.0 if cost is None or made is None else cost.setup
            found.append(Way(changes, settings, count, setup + taken + beside, peak))
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
