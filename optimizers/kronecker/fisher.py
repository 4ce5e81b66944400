"""Vectors in a model's outputs whose outer products add up to a Fisher matrix there.

    type-2         every column of the root of the loss's Hessian: the Gauss-Newton matrix, without chance
    monte-carlo    gradients for targets that the model's own distribution draws: the same on average
    empirical      gradients for the targets there are, each with the weight that its example has in the loss

The loss's own normalisation is in the vectors, whether it is a mean or a sum.

An example of "empirical" is what the loss adds one term for, so that outputs (B, T, C) have the factors of (B T, C):

    classes (N, C, ...)            a site of all classes
    means over entries (N, ..., C) a row along the last dimension, for squared errors and the like (N, C)
    another loss                   an entry of integer targets; else what the outputs' first dimension counts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.layerwise.kronecker_work import loss_root_of_examples
from curvature.losses.rules import CrossEntropy, LossRule

__all__ = ["FISHERS", "fisher_columns", "has_terms"]

FISHERS = ("monte-carlo", "empirical", "type-2")
MAX_COLUMNS = 1000  # of the exact root: a backward pass each


def fisher_columns(
    fisher: str, rule: LossRule, outputs: Tensor, targets: Any, generators: Sequence[torch.Generator]
) -> Iterator[tuple[Tensor, float]]:
    """Yield vectors of the outputs' shape, and what each counts.

    Args:
        fisher: "monte-carlo", "empirical" or "type-2".
        rule: of the loss.
        outputs: of the model; their first dimension counts examples.
        targets: of the loss.
        generators: one for each sample of "monte-carlo".

    Raises:
        InputError: if the loss couples examples; if "type-2" takes more than `MAX_COLUMNS` columns.
    """
    outputs = outputs.detach()
    if fisher == "empirical":
        _refuse_coupled(rule, outputs, targets)
        v = rule.output_gradient(outputs, targets)
        yield v if rule.reduction == "sum" else v * _inverse_roots_of_shares(rule, outputs, targets), 1.0
        return
    root = loss_root_of_examples(rule, outputs, targets, fisher)
    if fisher == "monte-carlo":
        for generator in generators:
            draws = root.draw("fisher-mc" if rule.closed_form else "ggn-mc", generator)
            yield from ((column, sign / len(generators)) for column, sign in draws)
        return
    if root.num_columns > MAX_COLUMNS:
        raise InputError(
            f'fisher="type-2" takes {root.num_columns} backward passes for the outputs of an example, more than '
            f'{MAX_COLUMNS}; fisher="monte-carlo" takes one a sample.'
        )
    for start, stop, sign in root.bounds(1):
        yield root.columns(start, stop)[0], sign


def has_terms(rule: LossRule, outputs: Tensor, targets: Any) -> bool:
    """Return whether a batch has terms to take a loss of: examples, and targets that a mean does not all ignore."""
    if outputs.numel() == 0:
        return False
    return rule.reduction == "sum" or not rule.closed_form or rule.num_terms(outputs, targets) != 0


def _inverse_roots_of_shares(rule: LossRule, outputs: Tensor, targets: Any) -> Tensor | float:
    """Return p^(-1/2), p the share of each example in what a mean divides by, as it multiplies outputs; 0 for none."""
    if outputs.ndim == 0 or (outputs.ndim == 1 and isinstance(rule, CrossEntropy)):
        return 1.0
    weights = rule.term_weights(outputs, targets) if isinstance(targets, Tensor) else None
    if weights is None or weights.ndim == 0 or len(weights) != len(outputs):
        return len(outputs) ** 0.5
    if not isinstance(rule, CrossEntropy):
        depth = max(1, outputs.ndim - 1)  # a row along the last dimension is one example
        if weights.shape[:depth] != outputs.shape[: min(depth, weights.ndim)]:
            depth = 1
        weights = weights.flatten(depth).sum(-1, dtype=torch.float64) if weights.ndim > depth else weights.double()
    shares = weights.double()
    roots = torch.where(shares > 0, (shares.sum() / shares.where(shares > 0, 1.0)).sqrt(), 0.0).to(outputs)
    if isinstance(rule, CrossEntropy):
        return roots.unsqueeze(1)
    return roots.view(*roots.shape, *[1] * (outputs.ndim - roots.ndim))


def _refuse_coupled(rule: LossRule, outputs: Tensor, targets: Any) -> None:
    """Put other examples' outputs in the place of every second one: the gradient in the rest must stay.

    Raises:
        InputError: if it does not.
    """
    if rule.closed_form or outputs.ndim == 0 or len(outputs) < 2:
        return
    moved = outputs.clone()
    moved[1::2] = outputs.roll(1, 0)[1::2]
    here, there = (rule.output_gradient(z, targets)[::2] for z in (outputs, moved))
    if not bool(here.isfinite().all()):
        return  # what is measured is refused for it
    eps = torch.finfo(outputs.dtype).eps
    if not bool((here - there).norm() <= 1e3 * eps * (here.norm() + there.norm())):
        raise InputError(
            'fisher="empirical" takes the outer product of each example\'s gradient, and the loss couples the examples '
            "of a batch: what it gives one depends on the others' outputs. Take a loss that is a sum or a mean over "
            "examples, or SOAP or Shampoo, which take any."
        )
