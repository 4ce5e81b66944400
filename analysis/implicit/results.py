"""What implicit regularization and backward error analysis are found to be: frozen records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from curvature.errors import InputError
from curvature.results.intervals import mean_interval
from curvature.results.record import Result

__all__ = [
    "BackwardError",
    "ImplicitRegularization",
    "PenaltyDirection",
    "batch_sizes",
    "expected_batch_variance",
    "momentum_factors",
    "penalty_factors",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class PenaltyDirection(Result):
    """The gradient of a penalty: where it pulls against the loss, and against curvature."""

    _large = ("gradient",)

    gradient: Tensor
    """(n,), of the penalty; loss / parameter."""
    norm: float
    """Its length; loss / parameter."""
    cosine_with_gradient: float
    """With the loss gradient; -1 to 1, NaN where one of them is zero."""
    cosines_with_top: Tensor | None
    """(k,), absolute cosines with the eigenvectors given; None if none were."""
    sharpness_change: float | None
    """d lambda_max / dt of the flow along minus this gradient, by first-order perturbation of the largest eigenvalue
    given; times lr x steps it is the change in so many steps, loss / parameter^2. None if none was given. Exact up to
    rounding; with ReLU or max-pooling it is that of the smooth piece the point lies in."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitRegularization(Result):
    """The loss that the mean iterate of SGD descends, C + P |g|^2 + V (1/m) sum_k |g_k - g|^2, and its parts."""

    _figure = "plot_penalties"

    loss: float
    """C, the mean over batches."""
    lr: float
    """Learning rate."""
    momentum: float
    """Heavy-ball momentum beta."""
    batch_size: float
    """B in examples; the mean where batches differ."""
    num_batches: float
    """m of an epoch."""
    drop_last: bool = False
    """Whether examples that fill no batch are left out of an epoch; otherwise the last batch is short."""
    squared_norm: float
    """|g|^2, weight decay included; (loss / parameter)^2."""
    batch_variance: float
    """(1/m) sum_k |g_k - g|^2, of the batches at hand or expected over all partitions (`expected_batch_variance`);
    (loss / parameter)^2."""
    batch_variance_stderr: float
    """One standard error over data of the same size; NaN where it is not known."""
    batch_variance_skewness: float = 0.0
    """Of the examples' parts of `batch_variance`; dimensionless."""
    batch_variance_dof: float = math.inf
    """Degrees of freedom of the standard error, `spread_dof`."""
    full_factor: float
    """P, lr / 4 for plain SGD; parameter^2 / loss."""
    batch_factor: float
    """V, lr / 4 for plain SGD; parameter^2 / loss. With momentum, `penalty_factors` has the share of a short batch."""
    layers: tuple[str, ...]
    """Names of the L modules that own parameters."""
    layer_squared_norms: Tensor
    """(L,), |g|^2 of each layer."""
    layer_batch_variances: Tensor
    """(L,), the layers' parts of `batch_variance`."""
    example_trace: float
    """Gamma = (1/N) sum_i (w_i / w)^2 |g_i - g|^2, w_i what example i counts in its batch and w its mean: all ones but
    for class weights, ignored targets and the like. NaN where only batches were looked at."""
    num_examples: float
    """N; NaN where only batches were looked at."""
    full: PenaltyDirection | None
    """Gradient of `full_penalty`; None if not asked for."""
    batch: PenaltyDirection | None
    """Gradient of `batch_penalty`; None if not asked for."""
    eigenvalues: tuple[float, ...] = ()
    """The largest of the Hessian, where they were looked against; loss / parameter^2."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def full_penalty(self) -> float:
        """P |g|^2, the penalty of full-batch descent; loss."""
        return self.full_factor * self.squared_norm

    @property
    def batch_penalty(self) -> float:
        """V (1/m) sum_k |g_k - g|^2, what the noise of batches adds; loss."""
        return self.batch_factor * self.batch_variance

    def batch_penalty_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of `batch_penalty` over data of the same size, `mean_interval`; NaN if not known.

        Its error is that of tr S: from 30 examples on 95 % intervals cover 93 to 97 % where squares of gradients
        have a variance, 85 to 92 % where they have none, which `notes` tell of in nine cases of ten and more. Of fewer
        examples they cover 90 % (10) or 83 % (5), which notes tell of, too.
        """
        return mean_interval(
            self.batch_penalty,
            self.batch_factor * self.batch_variance_stderr,
            dof=self.batch_variance_dof,
            skewness=self.batch_variance_skewness,
            confidence=confidence,
        )

    @property
    def modified_loss(self) -> float:
        """The sum of loss and penalties; loss."""
        return self.loss + self.full_penalty + self.batch_penalty

    @property
    def layer_full_penalties(self) -> Tensor:
        """(L,), the layers' parts of `full_penalty`."""
        return self.full_factor * self.layer_squared_norms

    @property
    def layer_batch_penalties(self) -> Tensor:
        """(L,), the layers' parts of `batch_penalty`."""
        return self.batch_factor * self.layer_batch_variances

    def batch_penalty_at(self, batch_size: int, *, drop_last: bool | None = None) -> float:
        """Return the expected `batch_penalty` at another batch size; NaN without Gamma.

        With `drop_last`, by default that of the record, it falls with the batch size; a short last batch raises it.
        """
        if math.isnan(self.example_trace):
            return math.nan
        N, dropped = int(self.num_examples), self.drop_last if drop_last is None else drop_last
        factor = penalty_factors(self.lr, self.momentum, N, batch_size, drop_last=dropped)[1]
        return factor * expected_batch_variance(self.example_trace, N, batch_size, drop_last=dropped)


@dataclass(frozen=True, kw_only=True, repr=False)
class BackwardError(Result):
    """How far the mean iterate after an epoch of SGD is from three flows, for several learning rates (E,)."""

    _figure = "plot_backward_error"

    lrs: Tensor
    """(E,), ascending."""
    num_batches: int
    """m, steps of an epoch."""
    num_epochs: int
    """Epochs run."""
    num_orders: int
    """Orders of the batches that the mean is over."""
    orders: str
    """"all", "reverse" (an order and its reverse) or "single"."""
    to_loss: Tensor
    """(E,), distance to the flow of C; parameters, as for all distances."""
    to_full: Tensor
    """(E,), distance to the flow of C + lr/4 |grad C|^2."""
    to_modified: Tensor
    """(E,), distance to the flow of C + lr/4 (1/m) sum_k |grad C_k|^2."""
    moved: Tensor
    """(E,), distance of the mean iterate from the start."""
    integrator_error: Tensor
    """(E,), error of the flows' integration, estimated by half the steps."""
    num_gradients: int
    """Gradients of single batches that were spent, a Hessian product counted as two."""
    notes: tuple[str, ...] = ()
    """What stands against the orders, such as kinks of the loss."""

    def slopes(self, which: str = "to_modified") -> Tensor:
        """Return the order of a distance in lr between neighbouring rates, (E - 1,): d log distance / d log lr."""
        distance: Tensor = getattr(self, which)
        return distance.log().diff() / self.lrs.log().diff()

    @property
    def fails_from(self) -> float | None:
        """The least lr from which on the modified flow is no nearer than that of C, at every greater lr measured."""
        fails = ~(self.to_modified < self.to_loss)
        run = fails.flip(0).long().cumprod(0).flip(0).bool()
        return float(self.lrs[run][0]) if bool(run.any()) else None


def batch_sizes(num_examples: int, batch_size: int, *, drop_last: bool = False) -> list[tuple[int, int]]:
    """Return the batches of an epoch as (how many, size): N // B whole ones, and one of the rest unless dropped.

    Raises:
        InputError: unless 1 <= B <= N are whole numbers.
    """
    if not (batch_size == int(batch_size) and 1 <= batch_size <= num_examples):
        raise InputError(f"batch_size must be a whole number from 1 to {num_examples} (examples), got {batch_size}.")
    whole, rest = divmod(num_examples, int(batch_size))
    return [(whole, int(batch_size)), *([(1, rest)] if rest and not drop_last else [])]


def expected_batch_variance(
    example_trace: float, num_examples: int, batch_size: int, *, drop_last: bool = False
) -> float:
    """Return the mean over all partitions of (1/m) sum_k |g_k - g|^2, g the gradient of all N examples.

    A batch of b examples has E |g_k - g|^2 = (N - b) / (N - 1) Gamma / b, that of drawing without replacement. All m
    batches count alike, as SGD steps: m - 1 of size B and a short one of what is left, or with `drop_last` all of B.
    By the law of the modified loss for each partition, lr / 4 times this is what shuffling adds to it on average.

    Raises:
        InputError: unless 1 <= B <= N are whole numbers.
    """
    sizes = batch_sizes(num_examples, batch_size, drop_last=drop_last)
    if num_examples == 1:
        return 0.0
    total = sum(count * (num_examples - size) / size for count, size in sizes)
    return total / sum(count for count, _ in sizes) / (num_examples - 1) * example_trace


def penalty_factors(
    lr: float, momentum: float, num_examples: int, batch_size: int, *, drop_last: bool = False
) -> tuple[float, float]:
    """Return the factors P of |g|^2 and V of `expected_batch_variance` in the modified loss, averaged over partitions.

    Those of `momentum_factors` belong to the mean gradient h of a partition's batches, P |h|^2 + V (1/m) sum_k
    |g_k - h|^2, and h differs from g where a batch is short or dropped: E |h - g|^2 = (N sum_i a_i^2 - 1) / (N - 1)
    Gamma, a_i the weight of example i in h. That part of the variance counts with P.
    """
    sizes, N = batch_sizes(num_examples, batch_size, drop_last=drop_last), num_examples
    m = sum(count for count, _ in sizes)
    P, V = momentum_factors(lr, momentum, m)
    whole = expected_batch_variance(1.0, N, batch_size, drop_last=drop_last)
    if whole == 0:
        return P, V
    apart = (N * sum(count / size for count, size in sizes) / m**2 - 1) / (N - 1)
    return P, V + (P - V) * apart / whole


def momentum_factors(lr: float, momentum: float, num_batches: float) -> tuple[float, float]:
    """Return the factors of |g|^2 and of (1/m) sum_k |g_k - g|^2 for SGD with heavy-ball momentum beta.

    With h = lr / (1 - beta), the step that momentum makes of a constant gradient, the iterate of full-batch descent
    follows the flow of C + (h/4) (1 + beta) / (1 - beta) |grad C|^2, C~ of Ghosh et al. over its constant 1 / (1 -
    beta). For batches in random order an epoch's second-order term differs from that of the full batch by

        -h^2 sum_{a > b} (1 - beta^(a - b)) / (m - 1)  times  (1/m) sum_k H_k g_k - H g,

    which gives the factor (h/4) (1 - 2 / (m (m - 1)) sum_{d < m} (m - d) beta^d): momentum amplifies the penalty of
    the full batch, not that of the noise. The velocity of an epoch is let run out; epochs are independent.
    `num_batches` need not be whole; below 2 there is no noise to weigh and the factor is h/4.

    Checked: (1 + beta) / (1 - beta) over plain descent is what the abstract of Ghosh et al. states; that h = lr / (1 -
    beta) stands in lr's place, by runs to a fixed time, whose error against this flow is of order lr^2, and of order lr
    against that of C; beta = 0 is Barrett and Dherin's. The second factor, by enumeration of all orders of an epoch.

    Reference: Ghosh, Lyu, Zhang and Wang (2023), Implicit regularization in heavy-ball momentum accelerated stochastic
    gradient descent, for the first factor; the second is the argument of Smith et al. (2021) with weights.
    """
    h, m = lr / (1 - momentum), round(num_batches)
    full = h / 4 * (1 + momentum) / (1 - momentum)
    if m < 2 or momentum == 0:
        return full, h / 4
    b = momentum
    lost = (m * b * (1 - b) - b * (1 - b**m)) / (1 - b) ** 2  # sum_{d < m} (m - d) b^d
    return full, h / 4 * (1 - 2 * lost / (m * (m - 1)))
