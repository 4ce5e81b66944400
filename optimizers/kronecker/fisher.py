"""Vectors in a model's outputs whose outer products add up to a Fisher matrix there.

    type-2         every column of the root of the loss's Hessian: the Gauss-Newton matrix, without chance
    monte-carlo    gradients for targets that the model's own distribution draws: the same on average
    empirical      gradients for the targets there are, each with the weight that its example has in the loss

The loss's own normalisation is in the vectors, whether it is a mean or a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.layerwise.kronecker_work import loss_root_of_examples
from curvature.losses.rules import LossRule
from optimizers.diagonal.curvature_source import inverse_roots_of_shares

__all__ = ["FISHERS", "fisher_columns"]

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
        v = rule.output_gradient(outputs, targets)
        yield v if rule.reduction == "sum" else v * inverse_roots_of_shares(rule, outputs, targets, v, len(v)), 1.0
        return
    root = loss_root_of_examples(rule, outputs, targets, fisher)
    if fisher == "monte-carlo":
        for generator in generators:
            draws = root.draw("fisher-mc" if rule.closed_form else "ggn-mc", generator)
            yield from ((column, sign / len(generators)) for column, sign in draws)
        return
    if root.num_columns > MAX_COLUMNS:
        raise InputError(
            f'fisher="type-2" takes a backward pass for each of {root.num_columns} outputs of an example, more than '
            f'{MAX_COLUMNS}; fisher="monte-carlo" takes one a sample.'
        )
    for start, stop, sign in root.bounds(1):
        yield root.columns(start, stop)[0], sign
