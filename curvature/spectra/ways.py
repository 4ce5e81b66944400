"""Ways to multiply and to hold a basis, and what each costs: what `plan` chooses among for a limit on memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from curvature.environment.cost import current_memory
from curvature.environment.device import is_gpu
from curvature.environment.memory import return_unused
from curvature.linalg.base.places import Place, spare_bytes
from curvature.linalg.base.validate import working_dtype
from curvature.linalg.krylov._krylov_space import most_rows
from curvature.linalg.krylov._ritz_selection import basis_size, expected_matvecs
from curvature.linalg.krylov._rounded_space import COLUMNS
from curvature.linop import MatrixLike
from curvature.spectra.basis_cost import DISK_SPEED
from curvature.spectra.product_cost import ProductCost

__all__ = ["Way", "graph_choices", "matvecs_of_pairs", "present_memory", "ways_to_pairs"]

_CHAIN = 15  # products of a chain outside the Krylov space and of the check at the end, as a rule
_FEW = 11  # vectors beside k: three to work with, and the chain
_UNTRAINED = 1.7  # times the products of trained networks: random weights take more, up to four times as many
_SPEED, _GPU_SPEED = 3e9, 8e10  # bytes of a basis a second, with all that a product does to it
_ROUNDED = 4  # times as long for each byte of a basis in a narrower dtype
_MOST_PIECES = 64


@dataclass(frozen=True)
class Way:
    """One way to compute what was asked for."""

    changes: dict[str, Any]
    """What is changed of the objective, for `Objective.replace`."""
    settings: dict[str, Any]
    """Keywords for the call."""
    num_matvecs: int
    """Products."""
    seconds: float
    """Wall-clock time of all products and of the basis, s."""
    peak_bytes: int
    """Largest memory of the process (on CUDA: of torch on the device), with what it holds now, bytes."""


def present_memory(device: torch.device) -> int:
    """Return the bytes in use now, without those that were freed."""
    if device.type == "cpu":
        return_unused()
    return current_memory(device)


def graph_choices(cost: ProductCost | None) -> Iterator[tuple[dict[str, Any], int, bool | None]]:
    """Yield (changes of the objective, pieces of a batch, whether graphs are kept), the fastest first."""
    yield {}, 1, None
    if cost is None:
        return
    if cost.keeps:
        yield {"keep_graphs": False}, 1, False
    pieces = 2
    while pieces <= min(cost.num_examples, _MOST_PIECES):
        size = math.ceil(cost.num_examples / pieces)
        yield {"keep_graphs": False, "micro_batch": size}, math.ceil(cost.num_examples / size), False
        pieces *= 2


def ways_to_pairs(A: MatrixLike, k: int, cost: ProductCost | None, seconds: float) -> list[Way]:
    """Return the ways to k eigenpairs by `eigsh`, that of its defaults first.

    Args:
        A: the matrix.
        k: number of pairs.
        cost: of a product with an objective's matrix.
        seconds: of a product with another.
    """
    n, dtype, present = int(A.shape[0]), working_dtype(A), present_memory(A.device)
    vector, expected = n * dtype.itemsize, matvecs_of_pairs(n, k)
    found = []
    for changes, pieces, keep in graph_choices(cost):
        each = seconds if cost is None else cost.seconds(1, pieces, keep)
        graphs = 0 if cost is None else cost.graphs(pieces, keep)
        work = 2 * vector if cost is None else cost.work(pieces)
        setup = 0.0 if cost is None else cost.setup
        for settings, place, itemsize in _bases(A, k, dtype):
            size = min(n, settings.get("num_basis", basis_size(k)))
            row = n * itemsize
            spare = spare_bytes(place, size_given="num_basis" in settings)
            grown = max(size + 1, min(spare // row, size + _CHAIN))
            rows, copied = grown * row, most_rows(size + 1, grown, n) * row
            rounded = "basis_dtype" in settings
            count = expected + k * rounded
            here = rows if place == A.device or (place == "disk" and not rounded) else 0
            widened = 2 * (size + 1) * min(n, COLUMNS) * dtype.itemsize
            kept = 0 if place == "disk" else here  # a file's pages are let go of during a product
            step = max(kept + work + vector * (kept == 0 or rounded), here + (2 + rounded) * vector + rounded * widened)
            step = max(step, copied + vector if here else 0)
            if rounded and place == "disk":  # the pairs are there, too, but for one
                last = max((k + 2) * vector + widened, vector + work)
            else:
                last = max(here + k * vector, (k * (1 + rounded) + 2) * vector + work)
            of_basis = rows * (_ROUNDED if rounded else 1) / _speed(place)
            found.append(
                Way(
                    changes=changes,
                    settings=settings,
                    num_matvecs=count,
                    seconds=setup + count * (each + of_basis),
                    peak_bytes=present + graphs + max(step, last),
                )
            )
    return found


def matvecs_of_pairs(n: int, k: int) -> int:
    """Return about how many products `eigsh` takes for k pairs of a matrix of size n, the chain included.

    For the three largest of six networks with random weights it takes 22 to 77 (`benchmarks/memory`), for those of
    trained ones 10 to 20 as a rule.
    """
    return min(n, round(_UNTRAINED * expected_matvecs(k)) + _CHAIN)


def _speed(place: Place) -> float:
    return DISK_SPEED if place == "disk" else _GPU_SPEED if is_gpu(place) else _SPEED


def _bases(A: MatrixLike, k: int, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], Place, int]]:
    """Yield (settings, where the basis is, bytes of an entry)."""
    here, full = A.device, dtype.itemsize
    few = {"num_basis": k + _FEW} if k + _FEW < basis_size(k) else {}
    yield {}, here, full
    if few:
        yield few, here, full
    yield {**few, "basis_dtype": torch.bfloat16}, here, 2
    if is_gpu(A.device):
        yield {"basis_device": "cpu"}, torch.device("cpu"), full
    for narrow in ({}, {"basis_dtype": torch.bfloat16}):
        yield {**few, **narrow, "basis_device": "disk"}, "disk", 2 if narrow else full
