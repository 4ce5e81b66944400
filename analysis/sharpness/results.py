"""What measuring sharpness returns: one row a measure, with its formula, its unit, its error and its price."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from analysis.records.measured import Measured
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["Kind", "SharpnessRow", "SharpnessTable"]

_WORDS = {
    "sam": "SAM",
    "asam": "ASAM",
    "l2": "ℓ₂",
    "linf": "ℓ∞",
    "fisher": "Fisher",
    "rao": "Rao",
    "keskar": "Keskar",
    "frobenius": "Frobenius",
}

Kind = Literal["exact", "estimate", "residual", "lower bound"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SharpnessRow(Result):
    """One measure of sharpness at one point; larger is sharper."""

    name: str
    """As `sharpness` takes it."""
    value: float
    """In `unit`."""
    stderr: float
    """In `unit`: one standard error over probes (of m-sharpness: over the pieces of the data), the residual of an
    eigenvalue, 0 where the value is exact up to rounding; NaN where it is a lower bound."""
    dof: float = math.inf
    """Degrees of freedom of `stderr`: probes or pieces less one."""
    skewness: float = 0.0
    """Of the samples that `stderr` is the spread of; dimensionless."""
    kind: Kind
    """What `stderr` is an error of: a lower bound is the best that an ascent found."""
    unit: str
    """Of `value`; "1" for pure numbers."""
    formula: str
    """What was computed, in plain text."""
    source: str
    """Who defined it."""
    rescaling_invariant: bool
    """Whether it stays as it is when a ReLU network is written otherwise: the weights and bias of one whole layer times
    a, the weights of the next divided by a."""
    unit_invariant: bool = False
    """Whether it also stays when each unit has an a of its own: its incoming weights and bias times a, its outgoing
    weights divided by a. Norms of layers and filters, and relative flatness, do not."""
    num_matvecs: int = 0
    """Products with a curvature matrix that were spent."""
    num_gradients: int = 0
    """Gradients over the data."""
    num_losses: int = 0
    """Forward passes over the data."""
    seconds: float = 0.0
    """Wall-clock time, s."""
    details: dict[str, float] = field(default_factory=dict)
    """Settings and by-products by name, e.g. the radius rho, or the terms of each layer."""

    @property
    def measured(self) -> Measured:
        """The value with its error; of m-sharpness, exact on these data, with its error over other data."""
        if self.name.endswith("m_sharpness"):
            return Measured(value=self.value, stderr=0.0, data_stderr=self.stderr, data_dof=self.dof)
        residual = self.kind == "residual"
        return Measured(value=self.value, stderr=self.stderr, residual=residual, dof=self.dof, skewness=self.skewness)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval that covers the value with this probability; see `Measured.interval`."""
        return self.measured.interval(confidence)

    @property
    def label(self) -> str:
        """The name as it is read."""
        words = self.name.replace("pac_bayes", "PAC-Bayes").replace("m_sharpness", "m-sharpness").split("_")
        return " ".join(_WORDS.get(word, word) for word in words)


@dataclass(frozen=True, kw_only=True, repr=False)
class SharpnessTable(Result):
    """Measures of sharpness of one loss at one point.

    None of them ranks models across settings: Andriushchenko et al. (2023) find rank correlations with generalisation
    of either sign, that follow the learning rate. Compare like with like, and look at the invariant ones first.
    """

    _figure = "plot_sharpness"

    rows: tuple[SharpnessRow, ...]
    """In the order they were asked for."""
    loss: float
    """L at the point, in units of the loss."""
    num_params: int
    """n."""
    left_out: tuple[str, ...] = ()
    """Names of measures that this loss, model or data do not allow, where all were asked for."""

    def __getitem__(self, name: str) -> SharpnessRow:
        """Return the row of a measure.

        Raises:
            InputError: if it was not measured.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"{name!r} was not measured; the table has {', '.join(row.name for row in self.rows)}.")

    def ratios(self, reference: SharpnessTable) -> dict[str, float]:
        """Return each measure over the same of another table, by name; NaN where that is 0 or was not measured."""
        known = {row.name: row.value for row in reference.rows}
        return {r.name: r.value / known[r.name] if known.get(r.name) else math.nan for r in self.rows}
