"""What trainings of small models with known theorems return: what was found, beside what the theorem says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from curvature.results.record import Result

__all__ = ["DeepLinearRun", "DiagonalRun", "LabelNoiseRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class DeepLinearRun(Result):
    """Gradient descent on W = W_N ... W_1 towards a matrix, and the closed form of its singular values."""

    _large = ("times", "singular_values", "expected", "effective_rank", "product", "loss", "balance")

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
    product: Tensor
    """(m, n), W at the end."""
    depth: int
    """N."""

    @property
    def deviation(self) -> float:
        """Largest difference to the closed form, relative to the largest singular value of the target; NaN without."""
        return float((self.singular_values - self.expected).abs().max() / self.expected[-1].max())


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalRun(Result):
    """The gradient flow of b = u^2 - v^2 from u = v = alpha, and the solution that the theorem names."""

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


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelNoiseRun(Result):
    """SGD with noise on the labels, b = v^2, beside the flow that it follows along the solutions."""

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
    least_trace: float
    """Its tr H."""
