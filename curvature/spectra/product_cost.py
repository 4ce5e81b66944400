"""What a product with an objective's matrix will take, without making one.

Seconds are those of a gradient, which is timed, times what products take in gradients. On a kept graph that is 1.3 to
2.4 for the Hessian and 1.1 to 1.5 for the Gauss-Newton matrix (`benchmarks/products/bench.py`), here 2 and 1.4; a
graph that is built anew costs 2 more, once for all columns. Bytes are those of the graph of the first batch, which is
built and watched; a product holds more: a derivative for each activation, until the backward pass comes to its layer,
which is 0.4 to 1 of the graph for the Hessian and up to 0.35 for the Gauss-Newton matrix, here 0.8 and 0.3, and with
convolutions, which work in copies of what they take, 1.4 for both (`benchmarks/memory`).
"""

from __future__ import annotations

from dataclasses import dataclass

from curvature.autograd.backward import walk
from curvature.data.parts import num_examples
from curvature.engine.linearize import LOSS_HESSIAN
from curvature.environment.cost import median_seconds
from curvature.environment.memory import HeldMemory, return_unused
from curvature.operators._objective_operator import ObjectiveOperator

__all__ = ["ProductCost", "product_cost"]

_COLUMN = {"hvp": 2.0, "ggnvp": 1.4}  # gradients that a column takes on a graph that is there
_REBUILT = 2.0  # gradients that building the graph of a product takes
_DERIVATIVES = {"hvp": 0.8, "ggnvp": 0.3}  # of what a graph holds: what a product holds besides, ...
_CONVOLVED = 1.4  # ... and with convolutions
_BACKWARD = 2 / 3  # of a gradient: all that is left of it where the graph of the loss is kept
_VECTOR_SECONDS = 4e-9  # a byte: what products of a piece take for their vectors, however small the piece


@dataclass(frozen=True)
class ProductCost:
    """Of a product, by how graphs are kept and batches cut."""

    gradient: float
    """Seconds of a gradient over the data."""
    per_column: float
    """Gradients that a column takes on a graph that is there."""
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
        passes = self.per_column * width + (0.0 if everything else _REBUILT)
        return self.gradient * passes + (pieces - 1) * self.num_batches * passes * self.vector * _VECTOR_SECONDS

    def graphs(self, pieces: int = 1, keep: bool | None = None) -> int:
        """Return the bytes of graphs that come on top of what is held now, that of a piece at work included."""
        kept, everything = self.kept(pieces, self.keeps if keep is None else keep)
        return max(0, kept + (0 if everything else self.graph // pieces + self.beside) - self.held)

    def work(self, pieces: int = 1) -> int:
        """Return the bytes that a product needs beside graphs and the vectors it is made with."""
        sums = 3 if pieces * self.num_batches > 1 else 2  # of batches, parts of a product, the same as one vector
        return self.derivatives // pieces + sums * self.vector

    @property
    def setup(self) -> float:
        """Seconds that the first product takes on top: graphs are built, and lean layers compared with autograd."""
        return self.gradient * (_REBUILT + 1)


def product_cost(A: ObjectiveOperator) -> ProductCost:
    """Return what products will take. Cost: two to six gradients over the data, and the graph of one batch.

    Graphs that were not there before are given up again: the call that follows may be another objective's.
    """
    objective, product = A.objective, getattr(A, "_product", "ggnvp")
    had_graphs = len(objective.kept) > 0
    objective.loss_and_gradient()  # loads, warms up, counts the batches
    seconds = median_seconds(objective.loss_and_gradient, objective.device)
    gradient = seconds / _BACKWARD if objective.keeps_all_graphs else seconds
    if not had_graphs:
        objective.release()
    if objective.device.type == "cpu":
        return_unused()  # before the graph of a batch is held beside what is kept
    vector = objective.num_params * objective.dtype.itemsize
    graph, beside, examples, convolved = _graph_of_first_batch(A, product)
    return ProductCost(
        gradient=gradient,
        per_column=_COLUMN[product],
        num_batches=objective.num_batches or 1,
        num_examples=examples,
        graph=graph,
        derivatives=int((_CONVOLVED if convolved else _DERIVATIVES[product]) * graph),
        vector=vector,
        beside=beside,
        keeps=objective.may_keep_graphs,
        room=float("inf") if objective.kept.keep is True else objective.kept.budget.num_bytes,
        held=objective.held_bytes,
    )


def _graph_of_first_batch(A: ObjectiveOperator, product: str) -> tuple[int, int, int, bool]:
    """Return the bytes that the graph of the first batch holds, and its gradient; examples; are there convolutions?"""
    objective, meter = A.objective, HeldMemory()
    _, _, batch = next(iter(objective.source))
    lin = objective.linearise(batch, trust=objective.trust, meter=meter)
    if lin.weight != 0:
        _ = lin._build_gradient() if product == "hvp" else lin._map(getattr(A, "_metric", LOSS_HESSIAN))
    beside = 0 if lin.is_large else lin.vector_bytes
    convolved = any("Conv" in node.name() for node in walk([lin.graph_root()]))
    return max(0, meter.held_bytes() - beside), beside, num_examples(lin.batch), convolved
