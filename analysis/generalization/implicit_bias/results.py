"""What trainings of small models with known theorems return: what was found, beside what the theorem says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.records.measured import Measured
from curvature.results.record import Result

__all__ = ["DeepLinearRun", "DiagonalRun", "ImplicitBias", "LabelNoiseRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class DeepLinearRun(Result):
    """Gradient descent on W = W_N ... W_1 towards a matrix, and the closed form of its singular values."""

    _figure = "plot_deep_linear"
    _large = (
        "times",
        "singular_values",
        "expected",
        "effective_rank",
        "product",
        "loss",
        "balance",
        "rates",
        "expected_rates",
        "hidden_error",
    )

    times: Tensor
    """(T,), steps times learning rate."""
    singular_values: Tensor
    """(T, r), of the product, descending."""
    expected: Tensor
    """(T, r), of the gradient flow from a balanced start along the target's singular vectors; NaN where there is no
    closed form: with entries that are not observed, or another start."""
    effective_rank: Tensor
    """(T,), exp of the entropy of the singular values' shares: from 1 to r."""
    loss: Tensor
    """(T,), half the squared distance to the observed entries."""
    balance: Tensor
    """(T,), largest |W_j+1' W_j+1 - W_j W_j'|, which the flow keeps."""
    rates: Tensor
    """(T, r), how fast the next step moves the singular values, over the learning rate."""
    expected_rates: Tensor
    """(T, r), what the flow from a balanced start does, whatever the loss: see `singular_value_rates`."""
    hidden_error: Tensor
    """(T,), distance to the entries that are not observed, relative; NaN where all are, or these are zero."""
    product: Tensor
    """(m, n), W at the end."""
    depth: int
    """N."""

    @property
    def deviation(self) -> float:
        """Largest difference to the closed form, relative to the largest singular value of the target; NaN without."""
        return float((self.singular_values - self.expected).abs().max() / self.expected[-1].max())

    @property
    def rate_deviation(self) -> float:
        """Largest difference of rates to the theorem's, relative to the largest of these.

        Without the start: there all singular values are equal, and which moves how fast is not defined.
        """
        rates, expected = self.rates[1:], self.expected_rates[1:]
        return float((rates - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalRun(Result):
    """The gradient flow of b = u^2 - v^2 from u = v = alpha, and the solution that the theorem names."""

    _figure = "plot_diagonal_linear"
    _large = ("solution", "expected", "least_l1", "least_l2", "losses", "times", "path")

    alpha: float
    """Initial u and v."""
    solution: Tensor
    """(d,), b at the end."""
    expected: Tensor
    """(d,), the minimum of Q_alpha among all b with X b = y."""
    least_l1: Tensor
    """(d,), the solution of smallest sum |b_i|."""
    least_l2: Tensor
    """(d,), the solution of smallest |b|."""
    times: Tensor
    """(T,), of the flow."""
    losses: Tensor
    """(T,), |X b - y|^2 / (2 n)."""
    path: Tensor
    """(T, d), b on the way."""

    def distance(self, to: Tensor) -> float:
        """Return |b - to| / |to|."""
        return float((self.solution - to).norm() / to.norm())

    @property
    def l1_excess(self) -> float:
        """Its l1 norm over the least there is, less 1: small also where several solutions nearly have the least."""
        return float(self.solution.abs().sum() / self.least_l1.abs().sum()) - 1


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelNoiseRun(Result):
    """SGD with noise on the labels, b = v^2, beside the flow that it follows along the solutions."""

    _figure = "plot_label_noise"
    _large = ("times", "trace", "expected_trace", "solution", "expected", "flow", "start", "losses")

    times: Tensor
    """(T,), steps times the square of the learning rate."""
    trace: Tensor
    """(T,), tr H at the mean weights of the steps around."""
    expected_trace: Tensor
    """(T,), tr H along the flow dv = -(c / 4) P grad tr H dt on the solutions."""
    losses: Tensor
    """(T,), |X b - y|^2 / (2 n) there, on labels without noise."""
    solution: Tensor
    """(d,), b at the mean weights of the last tenth of the steps."""
    start: Tensor
    """(d,), b where the gradient flow without noise ends, and SGD and the flow begin."""
    flow: Tensor
    """(d,), b at the end of the flow."""
    expected: Tensor
    """(d,), the solution b >= 0 of smallest tr H = 4 sum_j m_j b_j: where the flow ends in the long run."""
    start_trace: float
    """tr H at the start."""
    least_trace: float
    """That of the flattest solution."""

    @property
    def deviation(self) -> float:
        """Mean of tr H over that of the flow, less 1, over the readings."""
        return float((self.trace / self.expected_trace - 1).mean())


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitBias(Result):
    """Linear models trained on the data of a task, each beside its theorem."""

    deep: tuple[DeepLinearRun, ...]
    """By depth: the correlation of targets and whitened inputs, all of it seen."""
    completed: tuple[DeepLinearRun, ...]
    """By depth: a matrix of low rank of which some entries are hidden."""
    diagonal: tuple[DiagonalRun, ...]
    """By size of the start."""
    noisy: tuple[LabelNoiseRun, ...]
    """SGD with label noise, a run a seed; none where the notes say why."""
    scale: float
    """Singular values at the start of `deep` and `completed`, whose targets have 1 as their largest."""
    rank: int
    """Of the matrix to be completed."""
    hidden: float
    """Share of its entries that are hidden."""
    teacher: Tensor
    """(d,), weights that made the targets of `diagonal` and `noisy`."""
    num_examples: int
    """Of `diagonal`."""
    noise: float
    """Of labels, in `noisy`."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    def noise_deviation(self) -> Measured:
        """Return the mean over seeds of tr H over that of the flow, less 1, with its error; NaN without seeds."""
        return _mean([run.deviation for run in self.noisy])

    def last_trace(self) -> Measured:
        """Return the mean over seeds of tr H in the last tenth, with its error; NaN without seeds."""
        return _mean([float(run.trace[-len(run.trace) // 10 :].mean()) for run in self.noisy])

    def summary(self) -> dict[str, Any]:
        """Return the deviations from the theorems."""
        return {
            "deep": max(run.deviation for run in self.deep),
            "completed": max(run.rate_deviation for run in self.completed),
            "diagonal": max(run.distance(run.expected) for run in self.diagonal),
            "noisy": self.noise_deviation().value,
        }


def _mean(values: list[float]) -> Measured:
    if not values:
        return Measured(value=math.nan, stderr=math.nan)
    x = torch.tensor(values, dtype=torch.float64)
    return Measured(value=float(x.mean()), stderr=float(x.std()) / math.sqrt(len(x)), dof=len(x) - 1.0)
