"""Where a diagonal method takes its curvature from: one place that measures it, whatever the update rule does with it.

A source turns the graph of one batch into contributions that add up over micro-batches and average over ranks, and at
the end of a step turns their sum into one estimate a parameter. With z random signs, H the Hessian of the batch's loss
and J the Jacobian of its outputs:

    HessianDiagonal       mean_s z_s * (H z_s)        E = diag H              one product a probe
    RowNorm               sqrt(mean_s (H z_s)^2)      E[.^2] = row norms^2    one product a probe
    GaussNewtonBartlett   mean_s (J' u_s)^2           E = diag J' H_loss J    one backward pass a sample
    EmpiricalFisher       mean_s (J' (s * v))^2       E = mean_n g_n^2        one backward pass a sample

with u a draw that has the covariance H_loss, v sqrt(N) times the gradient of the loss in the outputs of N examples, s a
random sign an example, and g_n the gradient of one example's loss. A product is taken through the graph of the gradient
that the step needs anyway, which is never built twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.losses.rules import CrossEntropy, LossRule
from optimizers.shared.differentiation import products
from optimizers.shared.probes import counter_generator, random_signs

__all__ = [
    "BatchGraph",
    "CurvatureSource",
    "EmpiricalFisher",
    "GaussNewtonBartlett",
    "HessianDiagonal",
    "RowNorm",
    "curvature_source",
    "inverse_roots_of_shares",
]

FIRST_PROBES = 10
WIDE = (torch.float32, torch.float64)

_TARGETS, _EXAMPLES = 2, 3  # keep the streams of sampled targets and of examples' signs apart from that of probes


@dataclass(frozen=True, kw_only=True)
class BatchGraph:
    """One batch's loss with its graph, and the counters that fix the random numbers."""

    params: Sequence[Tensor]  # the parameters whose curvature is due
    gradients: Sequence[Tensor | None]
    """Of the loss in them; with a graph of their own if the source needs second derivatives."""
    outputs: Tensor | None = None  # of the model, with graph; None where the closure returned the loss itself
    targets: Any = None
    rule: LossRule | None = None
    weight: float = 1.0  # factor on the loss of this batch
    seed: int = 0
    step: int = 0
    place: int = 0  # which micro-batch of the step, counted over ranks: independent draws where independence is needed
    first: bool = False  # whether a parameter has no estimate from earlier steps


@dataclass(frozen=True)
class CurvatureSource(ABC):
    """How a diagonal curvature is measured. `num_probes` products or samples are averaged a step."""

    num_probes: int = 1

    second_order: ClassVar[bool] = True  # whether gradients need a graph of their own
    signed: ClassVar[bool] = False  # whether the estimate changes sign with the loss

    def __post_init__(self) -> None:
        if isinstance(self.num_probes, bool) or not isinstance(self.num_probes, int) or self.num_probes < 1:
            raise InputError(f"num_probes must be an integer >= 1, got {self.num_probes!r}.")

    @abstractmethod
    def measure(self, batch: BatchGraph) -> list[list[Tensor]]:
        """Return lists of one tensor a parameter, which add up over micro-batches and average over ranks."""

    def finish(self, sums: list[list[Tensor]]) -> list[Tensor]:
        """Return the step's estimate from the summed contributions, one tensor a parameter."""
        return sums[0]

    def _products(self, batch: BatchGraph, num_probes: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield (z, H z); the last product frees the graph."""
        for sample in range(num_probes):
            z = random_signs(batch.params, batch.seed, batch.step, sample)
            yield z, _widened(products(batch.gradients, batch.params, z, retain_graph=sample + 1 < num_probes))


class HessianDiagonal(CurvatureSource):
    """diag H by random signs: the mean of z * (H z).

    Variance of one probe in entry i: sum_{j != i} H_ij^2, often far more than H_ii^2. An average of the *squares* of
    such estimates, as in AdaHessian with one probe, goes to sum_j H_ij^2, the squared row norm of H: (H z)_i^2 has that
    expectation. More probes bring it down towards H_ii^2 + sum_{j != i} H_ij^2 / num_probes.
    """

    signed = True

    def measure(self, batch: BatchGraph) -> list[list[Tensor]]:
        total: list[Tensor] = []
        for z, Hz in self._products(batch, self.num_probes):
            sampled = list(torch._foreach_mul(Hz, z))
            total = list(torch._foreach_add(total, sampled)) if total else sampled
        if self.num_probes > 1:
            torch._foreach_div_(total, self.num_probes)
        return [total]


class RowNorm(CurvatureSource):
    """Norms of the rows of H: the root of the mean of (H z)^2. E of the square is sum_j H_ij^2.

    The first estimate of a run averages `FIRST_PROBES` probes at least: (H z)_i, a sum of random signs, may cancel, and
    a step divided by it alone would be as much too long. With m probes their mean square falls below c^2 sum_j H_ij^2
    with a probability of about (m c^2 / 2)^(m/2) / Gamma(m/2 + 1): at c = 0.1, 8 % for m = 1 and 3e-9 for m = 10.

    Reference: Dauphin, de Vries and Bengio (2015), Equilibrated adaptive learning rates for non-convex optimization.
    """

    def measure(self, batch: BatchGraph) -> list[list[Tensor]]:
        num_probes = max(self.num_probes, FIRST_PROBES) if batch.first else self.num_probes
        return [Hz for _, Hz in self._products(batch, num_probes)]

    def finish(self, sums: list[list[Tensor]]) -> list[Tensor]:
        if len(sums) == 1:
            return list(torch._foreach_abs(sums[0]))
        squares = list(torch._foreach_mul(sums[0], sums[0]))
        for Hz in sums[1:]:
            torch._foreach_addcmul_(squares, Hz, Hz)
        torch._foreach_div_(squares, len(sums))
        torch._foreach_sqrt_(squares)
        return squares


class _OutputSquares(CurvatureSource):
    """The mean of (J' u)^2 over random vectors u on the outputs: never negative, no second derivatives.

    Micro-batches and ranks draw independently and their squares are averaged, which has the same expectation as one
    draw on the joined batch, and less variance.
    """

    second_order = False
    stream: ClassVar[int]

    @abstractmethod
    def _draw(self, rule: LossRule, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        """Return u, of the outputs' shape."""

    def measure(self, batch: BatchGraph) -> list[list[Tensor]]:
        if batch.outputs is None or batch.rule is None:
            raise InputError(
                f"{type(self).__name__} needs the outputs of the model and their loss: give loss= to the optimizer, "
                "e.g. loss=torch.nn.functional.cross_entropy, and a closure that returns (outputs, targets), e.g. "
                'lambda: (model(x), y). For a closure that returns the loss pass curvature="hessian-diagonal".'
            )
        total: list[Tensor] = []
        for sample in range(self.num_probes):
            device = batch.outputs.device
            generator = counter_generator(device, self.stream, batch.seed, batch.step, sample, batch.place)
            try:
                u = self._draw(batch.rule, batch.outputs, batch.targets, generator)
            except RuntimeError as error:  # torch refuses to draw classes from such probabilities
                if bool(batch.outputs.isfinite().all()):
                    raise
                raise NonFiniteError(
                    "the outputs of the model are not finite, so that nothing can be drawn from them: the run has "
                    "diverged, lower lr."
                ) from error
            last = sample + 1 == self.num_probes
            g = _widened(products([batch.outputs], batch.params, [u], retain_graph=not last))
            if total:
                torch._foreach_addcmul_(total, g, g)
            else:
                total = list(torch._foreach_mul(g, g))
        torch._foreach_mul_(total, batch.weight / self.num_probes)
        return [total]


class GaussNewtonBartlett(_OutputSquares):
    """The diagonal of the Gauss-Newton matrix, by targets drawn from the model's own prediction.

    For the losses it knows, which are negative log-likelihoods (`LossRule.sampled_gradient`), that matrix is the Fisher
    information mean_n E_y [s s'], s the gradient of -log p(y | x_n), times what the loss is in such units (2 for
    squared errors): "fisher" is another name of this source. Sophia's estimate, the batch size times the square of the
    mean gradient for drawn labels, has the same distribution.
    """

    stream = _TARGETS

    def _draw(self, rule: LossRule, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        return rule.sampled_gradient(outputs, targets, generator)


class EmpiricalFisher(_OutputSquares):
    """The mean of the squared gradients of the examples, for the targets they have: any loss of rows of the outputs.

    Gradients of examples are not formed: random signs s_n make E (sum_n s_n g_n)^2 = sum_n g_n^2, one backward pass.
    With a loss that is a mean the estimate is of sum_n p_n g_n^2, p_n the share of row n of the outputs in what the
    mean divides by: 1 / N, less with ignored targets, other with class weights. With a sum it is sum_n g_n^2. It is no
    curvature: it vanishes where every example is fitted, and agrees with the Fisher information only where the
    model's predictions match the targets' distribution.

    Reference: Kunstner, Balles and Hennig (2019), Limitations of the empirical Fisher approximation for natural
    gradient descent.
    """

    stream = _EXAMPLES

    def _draw(self, rule: LossRule, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        v = rule.output_gradient(outputs, targets)
        rows = 1 if v.ndim == 0 or (v.ndim == 1 and isinstance(rule, CrossEntropy)) else v.shape[0]
        bits = torch.randint(2, (rows,), generator=generator, device=v.device)
        signs = (2 * bits - 1).to(v.dtype).view(rows, *[1] * (v.ndim - 1)) if v.ndim else v.new_ones(())
        if rule.reduction == "sum":
            return v * signs
        return v * signs * inverse_roots_of_shares(rule, outputs, targets, v, rows)


def inverse_roots_of_shares(rule: LossRule, outputs: Tensor, targets: Any, v: Tensor, rows: int) -> Tensor | float:
    """Return p_n^(-1/2), 0 for rows that do not count, to multiply the rows of v; alike where shares are not known."""
    weights = rule.term_weights(outputs, targets) if isinstance(targets, Tensor) else None
    if weights is None or weights.ndim == 0 or len(weights) != rows or v.ndim == 0:
        return rows**0.5
    shares = weights.reshape(rows, -1).sum(1, dtype=torch.float64)
    roots = torch.where(shares > 0, (shares.sum() / shares.where(shares > 0, 1.0)).sqrt(), 0.0)
    return roots.to(v).view(rows, *[1] * (v.ndim - 1))


_SOURCES: dict[str, type[CurvatureSource]] = {
    "hessian-diagonal": HessianDiagonal,
    "row-norm": RowNorm,
    "gauss-newton-bartlett": GaussNewtonBartlett,
    "fisher": GaussNewtonBartlett,
    "empirical-fisher": EmpiricalFisher,
}


def curvature_source(curvature: str | CurvatureSource, num_probes: int) -> CurvatureSource:
    """Return a source by its name, or the one given.

    Raises:
        InputError: if there is no source of that name.
    """
    if isinstance(curvature, CurvatureSource):
        return curvature
    if curvature not in _SOURCES:
        raise InputError(f"curvature must be one of {', '.join(_SOURCES)} or a CurvatureSource, got {curvature!r}.")
    return _SOURCES[curvature](num_probes)


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    """Return float32 or wider: estimates are squared and averaged, also those of bfloat16 parameters."""
    return [t if t.dtype in WIDE else t.float() for t in tensors]
