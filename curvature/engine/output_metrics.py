"""Symmetric matrices on a model's outputs: what stands between J' and J in Gauss-Newton, Fisher and their relatives.

All these matrices are sum_b w_b J_b' M_b J_b / sum_b w_b on the same graph; they differ in M, which acts on the outputs
of each example or target on its own:

- `LossHessian`: the second derivative of the loss;
- `SampledFisher`: the mean of s s' over targets that the model draws, s the gradient of the loss in the outputs;
- `LossGradients`: the same with the targets of the data.

A metric is a small frozen object: linearised batches keep what they computed for it as long as it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from curvature.autograd.lazy_logits import LazyLogits
from curvature.engine import blocked_metrics
from curvature.engine.blocked_metrics import RootsMap
from curvature.errors import InputError
from curvature.losses.rules import LossRule, OutputMap

__all__ = ["BatchOutputs", "LossGradients", "LossHessian", "OutputMetric", "Per", "SampledFisher", "example_shares"]

Per = Literal["example", "target"]


@dataclass(frozen=True)
class BatchOutputs:
    """What the model returned for one batch, and what its loss compares it with."""

    rule: LossRule
    outputs: Tensor
    """Detached."""
    targets: Any
    index: int
    """Place of the batch in the data."""


class OutputMetric(Protocol):
    """A symmetric matrix on the outputs of every batch. Hashable: batches keep its map under it."""

    def at(self, batch: BatchOutputs) -> OutputMap | RootsMap:
        """Return u -> M u for a batch, with M scaled as the batch's loss is reduced.

        Logits in blocks have a map on what goes into them instead.
        """


@dataclass(frozen=True)
class LossHessian:
    """M = the Hessian of the batch's loss in its outputs."""

    def at(self, batch: BatchOutputs) -> OutputMap | RootsMap:
        if isinstance(batch.outputs, LazyLogits):
            return blocked_metrics.loss_hessian(batch)
        return batch.rule.output_hessian(batch.outputs, batch.targets)


@dataclass(frozen=True)
class SampledFisher:
    """M = the mean of s s' over targets drawn by the model; the same draws at every use on a batch."""

    num_samples: int
    """Draws for every target."""
    seed: int
    """Fixes the draws, together with the place of the batch in the data."""
    rank: int = 0
    """Place of the process that holds the batch: batches of several ranks have draws of their own."""

    def at(self, batch: BatchOutputs) -> OutputMap | RootsMap:
        mixed = np.random.SeedSequence([self.seed, self.rank, batch.index]).generate_state(1, np.uint64)
        generator = torch.Generator(batch.outputs.device).manual_seed(int(mixed[0]))
        if isinstance(batch.outputs, LazyLogits):
            return blocked_metrics.sampled_fisher(batch, self.num_samples, generator)
        return batch.rule.sampled_fisher(batch.outputs, batch.targets, self.num_samples, generator)


@dataclass(frozen=True)
class LossGradients:
    """M = sum_i q_i s_i s_i', s_i the gradient of example i's mean loss in the outputs, q_i its share of the batch.

    The gradient of the batch's loss in the outputs is d = sum_i q_i s_i, and as every s_i has its own place in it,
    q_i s_i s_i' = d_i d_i' / q_i: no example is differentiated on its own.
    """

    per: Per

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise InputError(
                f"per must be 'example' (the first dimension) or 'target' (each loss term), got {self.per!r}."
            )

    def at(self, batch: BatchOutputs) -> OutputMap | RootsMap:
        if isinstance(batch.outputs, LazyLogits):  # each row is an example and a target
            return blocked_metrics.outer_products(batch, example_shares(batch, self.per))
        shares, dims = _shares_over_outputs(batch, self.per)
        d = batch.rule.output_gradient(batch.outputs, batch.targets)
        d = d.to(torch.promote_types(d.dtype, torch.float32))
        if not batch.rule.closed_form:
            _refuse_coupling(batch, dims)
        counts = shares > 0
        if not bool((_sum(d.abs(), dims)[~counts] <= 0).all()):
            raise InputError(
                "a target of weight 0 adds to the loss (label smoothing with a class weight of 0, or a mask of the "
                "loss's own?): its own gradient is not defined; leave such targets out by ignore_index."
            )
        inverse = torch.where(counts, 1 / shares.where(counts, 1.0), 0.0)

        def product(u: Tensor) -> Tensor:
            return d * (inverse * _sum(d * u.to(d.dtype), dims))

        return product


def example_shares(batch: BatchOutputs, per: Per) -> Tensor:
    """Return q_i = w_i / sum_i w_i, float64: the batch's loss is sum_i q_i l_i, l_i the mean loss of example i's terms.

    w_i is the weight of the example's loss terms: their number, or the sum of their class weights. Where the loss sums
    instead of averaging, q_i = w_i.

    Args:
        batch: its outputs and targets.
        per: "example" for one example a first index, "target" for one a loss term.

    Raises:
        InputError: if the loss terms do not match the outputs.
    """
    if not isinstance(batch.targets, Tensor):
        raise InputError(
            f"single examples are told apart by targets that are one tensor, got {type(batch.targets).__name__}; pass "
            "a forward that returns such targets."
        )
    weights = batch.rule.term_weights(batch.outputs, batch.targets)
    if per == "example" and weights.ndim > 1:
        weights = weights.flatten(1).sum(1, dtype=torch.float64)
    weights = weights.to(torch.float64)
    if batch.rule.reduction == "sum":
        return weights
    return weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)  # all ignored: no share, instead of 0 / 0


def _shares_over_outputs(batch: BatchOutputs, per: Per) -> tuple[Tensor, tuple[int, ...]]:
    """Return the shares, in a shape that broadcasts over the outputs, and the dimensions of one example's outputs."""
    shares = example_shares(batch, per)
    outputs, terms = batch.outputs, batch.rule.term_weights(batch.outputs, batch.targets)
    without_classes = outputs.shape[:1] + outputs.shape[2:]
    if terms.ndim == 0:
        dims = tuple(range(outputs.ndim))
    elif terms.shape == outputs.shape:
        dims = () if per == "target" else tuple(range(1, outputs.ndim))
    elif terms.shape == without_classes:  # (N, C, ...) with targets (N, ...)
        dims = (1,) if per == "target" else tuple(range(1, outputs.ndim))
    elif terms.shape == outputs.shape[: terms.ndim]:
        dims = tuple(range(terms.ndim if per == "target" else 1, outputs.ndim))
    else:
        raise InputError(
            f"the loss has terms of shape {tuple(terms.shape)}, which do not lie on outputs of shape "
            f"{tuple(outputs.shape)}: (N, ...), (N, C, ...) or (N, ..., C) is needed; reshape in forward."
        )
    shape = [1 if i in dims else outputs.shape[i] for i in range(outputs.ndim)]
    return shares.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(shape), dims


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.sum(dims, keepdim=True) if dims else values  # torch sums over everything for no dimension


def _refuse_coupling(batch: BatchOutputs, dims: tuple[int, ...]) -> None:
    """Refuse a loss whose second derivative mixes examples: half of them are moved, the others must not notice."""
    generator = torch.Generator().manual_seed(0)
    outputs = batch.outputs
    u = torch.randn(outputs.shape, generator=generator).to(outputs)
    shape = [1 if i in dims else n for i, n in enumerate(outputs.shape)]
    moved = (torch.rand(shape, generator=generator) < 0.5).to(outputs)
    Hu = batch.rule.output_hessian(outputs, batch.targets)(moved * u)
    size = float(Hu.abs().max())
    seen = float(((1 - moved) * Hu).abs().max())
    if not seen <= 100 * torch.finfo(Hu.dtype).eps * size:
        raise InputError(
            "the loss couples its examples (its second derivative mixes them), so that no example has a loss of its "
            "own; per='example' takes what shares a first index for one example."
        )
