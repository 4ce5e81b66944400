"""What pruning is found to do: changes of the loss, predicted and true, and trainings of sub-networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.records.measured import Measured
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["ALL", "EACH", "PruningPoint", "PruningRecord", "TicketRow", "Tickets"]

ALL = "all"
"""The layer of a point at which all tensors are ranked together."""
EACH = "each"
"""That of a point at which every tensor loses the same share."""
Predictor = Literal["predicted", "own", "diagonal", "size"]


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningPoint(Result):
    """Some weights removed by one method, and what became of the loss; changes in units of the loss."""

    method: str
    """Who chose the weights, and moved the others."""
    layer: str
    """The tensor they are of; or "all": the lowest scores of all tensors together; "each": the lowest of each."""
    sparsity: float
    """Share that was asked for, of the weights of this tensor (or of all that may be removed)."""
    num_pruned: int
    """Weights removed."""
    linear: float
    """g'd, of the displacement d of all weights."""
    curvature: float
    """1/2 d'H d, with the exact Hessian."""
    predicted_stderr: float
    """One standard error of their sum over data of the same size; NaN where it is not known."""
    own: float
    """g'd + 1/2 d'A d with the method's own matrix A; NaN for random, without g'd and without unit for magnitude."""
    diagonal: float
    """1/2 sum over the removed of G_ii w_i^2, with the Gauss-Newton diagonal; NaN where it is not known."""
    size: float
    """1/2 sum over the removed of w_i^2."""
    true: float
    """L(w + d) - L(w) on the data of the scores."""
    true_stderr: float
    """One standard error of it, from differences by batch."""
    held_out: float
    """The same change on data that took no part in the scores, of a summed loss scaled to as many examples; NaN without
    such data."""
    held_out_stderr: float
    """Likewise."""

    @property
    def predicted(self) -> float:
        """What the quadratic model says, g'd + 1/2 d'H d."""
        return self.linear + self.curvature


@dataclass(frozen=True, kw_only=True, repr=False)
class TicketRow(Result):
    """Trainings of one kind, one for each seed."""

    kind: str
    """"dense"; "ticket": rewound and masked by the trained weights; "random": rewound, as many weights a tensor drawn;
    "reinitialised": the ticket's mask on new initial weights."""
    sparsity: float
    """Share of the weights that may be removed."""
    values: tuple[float, ...]
    """The metric on held-out data at the end, by seed."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Tickets(Result):
    """Sub-networks trained again from where the dense network began, or soon after."""

    _figure = "plot_tickets"

    metric: str
    """"accuracy", or "loss" where targets are no classes."""
    rows: tuple[TicketRow, ...]
    """Dense first."""
    steps: int
    """Of each training."""
    rewind: int
    """Steps after the beginning that tickets are rewound to."""

    def __getitem__(self, key: tuple[str, float]) -> TicketRow:
        """Return the trainings of a kind at a sparsity.

        Raises:
            InputError: if there are none.
        """
        for row in self.rows:
            if (row.kind, row.sparsity) == key:
                return row
        there = ", ".join(f"({r.kind!r}, {r.sparsity:g})" for r in self.rows)
        raise InputError(f"no trainings of {key}; there are {there}.")

    def difference(self, kind: str, sparsity: float, than: str = "dense") -> Measured:
        """Return the mean difference to other trainings of the same seeds, with its standard error over them."""
        other = self.rows[0] if than == "dense" else self[than, sparsity]
        pairs = np.array(self[kind, sparsity].values) - np.array(other.values)
        count = len(pairs)
        stderr = float(pairs.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        return Measured(value=float(pairs.mean()), stderr=stderr, dof=count - 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningRecord(Result):
    """Which weights a loss can lose, by several methods."""

    _figure = "plot_pruning"

    points: tuple[PruningPoint, ...]
    """By method, layer and sparsity."""
    layers: dict[str, int]
    """Tensors whose weights may be removed, and how many they have."""
    loss: float
    """L before, on the data of the scores."""
    held_out_loss: float
    """L before, on data held out, of a summed loss scaled to as many examples; NaN without such data."""
    num_params: int
    """n, with those that are never removed: biases and normalisation layers."""
    dampings: dict[str, float]
    """By method that inverts a matrix: what was added to its diagonal."""
    tickets: Tickets | None
    """Sub-networks trained again; None if not asked for."""
    notes: tuple[str, ...] = ()
    """What a reader should know: methods that did not serve, and why."""

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order they were measured in."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    def of(self, method: str, layer: str | None = None) -> tuple[PruningPoint, ...]:
        """Return the points of a method: of one layer, or (None) of all single tensors.

        Raises:
            InputError: if there are none.
        """
        ours = [p for p in self.points if p.method == method]
        wanted = [p for p in ours if p.layer == layer or (layer is None and p.layer not in (ALL, EACH))]
        if not wanted:
            raise InputError(
                f"nothing was measured of {method!r}, layer {layer!r}; there are {', '.join(self.methods)}."
            )
        return tuple(wanted)

    def rank_correlation(self, method: str, predictor: Predictor = "predicted", *, most: float = 0.5) -> float:
        """Return Spearman's correlation of predicted and true changes, over single layers and sparsities up to `most`.

        NaN where nothing was predicted, or with fewer than three points.
        """
        points = [p for p in self.of(method) if p.sparsity <= most + 1e-9]
        said, true = ([getattr(p, name) for p in points] for name in (predictor, "true"))
        if len(points) < 3 or any(math.isnan(x) for x in said):
            return math.nan
        return _spearman(np.array(said), np.array(true))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
