"""Matrices on the logits of a head that works in blocks, as maps on what goes into it.

With Z the Jacobian of the logits in the roots (those of h, W and b that vary) and M one of the matrices of
`curvature.engine.output_metrics`, the map is u -> Z'M Z u; the logits exist for a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature.autograd.lazy_logits import LazyLogits, NotInBlocksError
from curvature.autograd.softmax_head import Core, SoftmaxHead
from curvature.errors import InputError
from curvature.losses.rules import CrossEntropy, LossRule

__all__ = ["RootsMap", "loss_hessian", "outer_products", "sampled_fisher"]

RootsMap = Callable[[Sequence[Tensor | None]], list[Tensor]]
"""u -> Z'M Z u over the roots; None stands for zero."""


class _Batch(Protocol):
    @property
    def rule(self) -> LossRule: ...
    @property
    def outputs(self) -> Tensor: ...
    @property
    def targets(self) -> Any: ...


def loss_hessian(batch: _Batch) -> RootsMap:
    """Return the map of the loss's second derivative in the logits."""
    head, log_sums, softmax, counted = _head(batch)
    return _map(batch, head.loss_hessian(_sizes(batch, head)), head, log_sums, softmax, counted)


def sampled_fisher(batch: _Batch, num_samples: int, generator: torch.Generator) -> RootsMap:
    """Return the map of the Fisher matrix from targets drawn by the model."""
    head, log_sums, softmax, counted = _head(batch)
    drawn = head.draw(log_sums, num_samples, generator)
    return _map(batch, head.sampled_fisher(_sizes(batch, head), drawn), head, log_sums, softmax, counted)


def outer_products(batch: _Batch, shares: Tensor) -> RootsMap:
    """Return the map of sum_i q_i s_i s_i' over rows i, q_i their shares (N,), s_i the gradient of a row's mean loss.

    Raises:
        InputError: if a row whose share is zero adds to the loss.
    """
    head, log_sums, softmax, counted = _head(batch)
    shares = shares[counted].to(head.dtype)
    if bool(((shares == 0) & (head.masses != 0)).any()):
        raise InputError(
            "a target of weight 0 adds to the loss (label smoothing with a class weight of 0): its own gradient is not "
            "defined; leave such targets out by ignore_index."
        )
    sizes = torch.where(shares > 0, _sizes(batch, head).square() / shares, 0.0)
    return _map(batch, head.outer_products(sizes), head, log_sums, softmax, counted)


def _head(batch: _Batch) -> tuple[SoftmaxHead, Tensor, Tensor, Tensor]:
    """Return the head on the rows that count, logarithms of its sums, softmax that is held, places of these rows."""
    logits, rule = batch.outputs, batch.rule
    assert isinstance(logits, LazyLogits)
    if not isinstance(rule, CrossEntropy):
        raise NotInBlocksError("the loss is not torch's cross-entropy")
    counted = (batch.targets != rule.settings.get("ignore_index", -100)).nonzero()[:, 0]
    rows = logits.like(h=logits.h[counted])
    head = rows.head(batch.targets[counted], rule.settings.get("weight"), rule.settings.get("label_smoothing", 0.0))
    softmax = head.room_for_softmax()
    log_sums, _ = head.log_sums_and_losses(softmax)
    return head, log_sums, softmax, counted


def _sizes(batch: _Batch, head: SoftmaxHead) -> Tensor:
    """Return what the reduction multiplies the loss of each row by."""
    scale = 1.0 if batch.rule.reduction == "sum" else 1.0 / batch.rule.num_terms(None, batch.targets)
    return torch.full((len(head.y),), scale, dtype=head.dtype, device=head.h.device)


def _map(batch: _Batch, M: Core, head: SoftmaxHead, log_sums: Tensor, softmax: Tensor, counted: Tensor) -> RootsMap:
    assert isinstance(batch.outputs, LazyLogits)
    varies, N = batch.outputs.varies, len(batch.targets)
    left_out = len(counted) < N

    def product(u: Sequence[Tensor | None]) -> list[Tensor]:
        given = iter(u)
        x, Y, beta = (next(given) if part else None for part in varies)
        x = x[counted] if x is not None and left_out else x
        of_h, of_W, of_b = head.curved(M, log_sums, softmax, (x, Y, beta), varies)
        if of_h is not None and left_out:
            of_h = of_h.new_zeros(N, of_h.shape[1]).index_copy_(0, counted, of_h)
        return [part for part in (of_h, of_W, of_b) if part is not None]

    return product
