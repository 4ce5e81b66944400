"""What a product with an objective's matrix will take, without making one.

A backward pass over the first batch is timed, and so is putting its gradient into one vector. On a kept graph a
product takes 2.1 to 3.5 backward passes for the Hessian and 1.3 to 2.2 for the Gauss-Newton matrix
(`benchmarks/products`), here 3 and 2; with convolutions up to 6.6 and 5.5, here 4 and 3.2; and it handles three vectors
besides, most of it where parameters are many and tokens few. A graph that is built anew costs two more, once for all
columns. Bytes are those of the graph of the first batch, which is built and watched; a product holds more: a derivative
for each activation, until the backward pass comes to its layer, which is 0.4 to 1 of the graph for the Hessian and up
to 0.35 for the Gauss-Newton matrix, here 0.8 and 0.3, and with convolutions, which work in copies of what they take,
1.4 for both (`benchmarks/memory`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from curvature.autograd.backward import walk
from curvature.data.parts import num_examples
from curvature.engine.linearize import LOSS_HESSIAN
from curvature.environment.cost import timed
from curvature.environment.memory import HeldMemory, return_unused
from curvature.objective.shards import refuse_by_module
from curvature.operators._objective_operator import ObjectiveOperator

__all__ = ["ProductCost", "product_cost"]

_COLUMN = {"hvp": 3.0, "ggnvp": 2.0}  # backward passes that a column takes on a graph that is there, ...
_CONVOLVED_COLUMN = {"hvp": 4.0, "ggnvp": 3.2}  # ... and with convolutions
_BUILT = 2.0  # backward passes that a forward pass and the graph of a product take
_VECTORS = 3  # that a column handles: in, out and added up
_DERIVATIVES = {"hvp": 0.8, "ggnvp": 0.3}  # of what a graph holds: what a product holds besides, ...
_CONVOLVED = 1.4  # ... and with convolutions
_RUNS = 3  # the same on every rank


@dataclass(frozen=True)
class ProductCost:
    """Of a product, by how graphs are kept and batches cut."""

    column: float
    """Seconds of a column on graphs that are there, without its vectors."""
    built: float
    """Seconds that building the graphs for a product takes, once for all columns."""
    vectors: float
    """Seconds that a column takes for its vectors, a batch or piece of one."""
    num_batches: int
    num_examples: int
    """Of the first batch; 0 if unknown."""
    graph: int
    """Bytes that the graph of the first batch holds beside its gradient."""
    derivatives: int
    """Bytes that a product with it holds besides."""
    vector: int
    """Bytes of a gradient."""
    beside: int
    """Bytes of the gradient that each graph holds, or none of it."""
    chained: bool
    """Whether products go by `curvature.engine.chain`."""
    keeps: bool
    """Whether graphs are kept at all."""
    room: float
    """Bytes that kept graphs may hold; no end where all are kept whatever they hold."""
    held: int
    """Bytes that they hold already."""

    def kept(self, pieces: int, keep: bool) -> tuple[int, bool]:
        """Return the bytes of kept graphs where each batch is cut into so many pieces, and whether these are all."""
        wanted = self.num_batches * (self.graph + pieces * self.beside) if keep else 0
        return int(min(wanted, self.room)), 0 < wanted <= self.room

    def seconds(self, width: float, pieces: int = 1, keep: bool | None = None) -> float:
        """Return the seconds of a product with `width` columns."""
        _, everything = self.kept(pieces, self.keeps if keep is None else keep)
        columns = width * (self.column + pieces * self.num_batches * self.vectors)
        return columns + (0.0 if everything else self.built + pieces * self.num_batches * self.vectors)

    def graphs(self, pieces: int = 1, keep: bool | None = None) -> int:
        """Return the bytes of graphs that come on top of what is held now, that of a piece at work included."""
        kept, everything = self.kept(pieces, self.keeps if keep is None else keep)
        return max(0, kept + (0 if everything else self.graph // pieces + self.beside) - self.held)

    def work(self, pieces: int = 1) -> int:
        """Return the bytes that a product needs beside graphs and the vectors it is made with."""
        many = self.chained or pieces * self.num_batches > 1  # a chain is compared with another product first
        sums = 3 if many else 2  # of batches, parts of a product, the same as one vector
        return self.derivatives // pieces + sums * self.vector

    @property
    def setup(self) -> float:
        """Seconds that the first product takes on top: graphs are built, and lean layers compared with autograd."""
        return self.built + self.column


def product_cost(A: ObjectiveOperator) -> ProductCost:
    """Return what products will take. Cost: a gradient over the data, three of one batch, and the graph of that.

    Graphs that were not there before are given up again: the call that follows may be another objective's.
    """
    objective, product = A.objective, getattr(A, "_product", "ggnvp")
    refuse_by_module(objective.shards, "plan() of an objective, unlike that of a ModelSize with world_size=,")
    had_graphs = len(objective.kept) > 0
    _, seconds = timed(objective.loss_and_gradient, objective.device)  # loads, warms up, counts the batches
    keeps = objective.keeps_all_graphs
    if not (keeps if objective.ranks is None else objective.ranks.everywhere(keeps, "what products cost")):
        _, seconds = timed(objective.loss_and_gradient, objective.device)
    kept, count = objective.keeps_all_graphs, objective.num_batches or 1
    if not had_graphs:
        objective.release()
    if objective.device.type == "cpu":
        return_unused()  # before the graph of a batch is held beside what is kept
    first = _first_batch(A, product)
    backward = count * first.backward
    return ProductCost(
        column=(_CONVOLVED_COLUMN if first.convolved else _COLUMN)[product] * backward,
        built=_BUILT * backward if kept else max(seconds, _BUILT * backward),  # with what loading takes
        vectors=_VECTORS * first.vector,
        num_batches=count,
        num_examples=first.examples,
        graph=first.graph,
        derivatives=int((_CONVOLVED if first.convolved else _DERIVATIVES[product]) * first.graph),
        vector=objective.num_params * objective.dtype.itemsize,
        beside=first.beside,
        chained=first.chained,
        keeps=objective.may_keep_graphs,
        room=float("inf") if objective.kept.keep is True else objective.kept.budget.num_bytes,
        held=objective.held_bytes,
    )


class _Batch(NamedTuple):
    backward: float
    vector: float
    graph: int
    beside: int
    examples: int
    convolved: bool
    chained: bool


def _first_batch(A: ObjectiveOperator, product: str) -> _Batch:
    """Return the seconds of a backward pass and of a vector, and the bytes that a graph holds and its gradient."""
    objective, meter = A.objective, HeldMemory()
    _, _, batch = next(iter(objective.source))
    lin = objective.linearise(batch, trust=objective.trust, meter=meter)
    whole = _least_seconds(lin.gradient, objective.device)
    parts = [p.detach() for p in objective.space.tensors.values()]
    vector = min(whole, _least_seconds(lambda: lin._flatten(list(parts)), objective.device))
    if lin.weight != 0:
        lin._build("hvp" if product == "hvp" else getattr(A, "_metric", LOSS_HESSIAN))
    beside = lin.vector_bytes if lin.holds_gradient and lin._chain is None else 0
    convolved = any("Conv" in node.name() for node in walk([lin.graph_root()]))
    held = max(0, meter.held_bytes() - beside)
    return _Batch(whole - vector, vector, held, beside, num_examples(lin.batch), convolved, lin._chain is not None)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the least of the seconds of a few runs: other work on the machine only adds to them."""
    return min(timed(work, device)[1] for _ in range(_RUNS))
