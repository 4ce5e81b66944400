"""One pass over the data: every batch's per-example gradients, each parameter's in the form that its uses allow.

With l_b the loss of batch b and h_i the part of its gradient that example i contributes, sum_i h_i = grad l_b; the
parts come out of one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.autograd.backward import no_autocast, pull_back
from curvature.autograd.lazy_logits import NotInBlocksError
from curvature.engine.evaluation import Evaluation
from curvature.errors import CheckFailedError, DataError, InputError
from curvature.losses.rules import AnyLoss
from curvature.objective.dependence import Dependence
from curvature.objective.objective import Objective
from curvature.objective.refusals import refuse_coupling
from curvature.objective.shards import refuse_by_module
from curvature.per_example.batch import Splitter, flat_gradient
from curvature.per_example.cutting import leading_size, session
from curvature.per_example.run import Part, Run
from curvature.per_example.tolerances import coarsest_eps, tolerance

__all__ = ["Group", "Walk"]


@dataclass(frozen=True)
class Group:
    """Examples whose gradients come out of one backward pass."""

    places: Tensor
    """(E,), their numbers in the whole data."""
    weights: Tensor
    """(E,), float64: how much each counts."""
    scale: Tensor
    """(E,): g_i = scale_i h_i, up to the total weight of a summed loss."""
    share: float
    """What `gradient` counts in the objective's, before division by the total weight."""
    gradient: Tensor
    """(n,), sum_i h_i."""
    parts: tuple[Part, ...]
    """What does not occur here has gradient zero."""


class Walk:
    """A pass over the per-example gradients of an objective.

    Attributes:
        budget: bytes for gradients that are held.
        chunk_bytes: size of temporary tensors.
        num_examples: seen so far.
        num_backwards: backward passes through whole batches so far.
        num_batches: batches seen so far.
        num_groups: groups yielded so far.
        batch: the latest.
        loss: sum of the batches' losses times what they count, so far.

    Args:
        objective: whose model and loss are known apart.
        per: "example" or "target".
        route: "auto", "rules", "vmap" or "loop".
        memory_budget: bytes for gradients that are held.
        in_blocks: hold no logits of a head that works in blocks.
    """

    def __init__(
        self, objective: Objective, *, per: str, route: str, memory_budget: int | None, in_blocks: bool = True
    ) -> None:
        if per not in ("example", "target"):
            raise InputError(f"per must be 'example' or 'target', got {per!r}.")
        refuse_by_module(objective.shards, "what is made of the gradients of single examples")
        self._splitter = Splitter(objective, route=route, memory_budget=memory_budget)
        self.budget, self.chunk_bytes = self._splitter.budget, self._splitter.chunk_bytes
        self._objective, self._evaluator = objective, objective.evaluator
        self._params = list(objective.space.tensors.values())
        self._per = per
        self._in_blocks = in_blocks and per == "example"  # targets are told apart by their logits
        self._dependence = Dependence(objective.dependence.whole)
        self.num_examples = self.num_backwards = self.num_batches = self.num_groups = 0
        self.batch: Any = None
        self.loss = 0.0

    def __iter__(self) -> Iterator[Group]:
        """Yield the groups in the order of the data."""
        for index, batch in enumerate(self._objective.batches()):
            self.num_batches, self.batch = self.num_batches + 1, batch
            for group in self._batch(batch, index):
                self.num_groups += 1
                yield group
        self._dependence.require()

    def count_terms(self) -> float:
        """Return the sum of all weights, over ranks too. Cost: a forward pass."""
        total = 0.0
        for index, batch in enumerate(self._objective.batches()):
            evaluation = self._splitter.open(batch, index, in_blocks=True).evaluation
            total += float(self._terms(evaluation, leading_size(self._evaluator, batch), index).sum())
        if self._objective.ranks is not None:
            _, total = self._objective.ranks.sum(torch.zeros(0, dtype=torch.float64), total)
        return total

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _batch(self, batch: Any, index: int) -> Iterator[Group]:
        run = self._splitter.open(batch, index, in_blocks=self._in_blocks)
        N, evaluation = run.num_examples, run.evaluation
        self._dependence.note_loss(evaluation.loss, evaluation.weight, self._params)
        terms = self._terms(evaluation, N, index)
        if N > 1:
            refuse_coupling(self._objective, batch, index)
        if evaluation.loss.requires_grad and not evaluation.outputs.requires_grad:  # type: ignore[union-attr]
            raise CheckFailedError(
                "the loss depends on the chosen parameters but the model's outputs do not: no example has a part in it."
            )
        per_example = self._per == "example"
        start = self.num_examples
        width = 1 if per_example else terms.shape[1]
        self.num_examples += N * width
        counts = terms.sum(1, keepdim=True) if per_example and terms.shape[1] != 1 else terms
        share = 1.0 if self._objective.is_sum else evaluation.weight
        if evaluation.weight != 0:
            self.loss += share * float(evaluation.loss.detach())
        total = float(terms.sum())
        if evaluation.weight == 0 or total == 0 or not evaluation.loss.requires_grad:
            weights = counts * (evaluation.weight / total if total > 0 and not self._objective.is_sum else 1.0)
            yield self._empty(start, weights.reshape(-1))
            return
        weights = counts if self._objective.is_sum else counts * (evaluation.weight / total)
        sums = []
        columns = [0] if per_example else [c for c in range(width) if bool(counts[:, c].any())]
        for c in columns:
            try:
                parts, flat, vectors = self._splitter.split(
                    run, None if per_example else self._of_column(run, c, width)
                )
            except NotInBlocksError:
                self._in_blocks = False
                run = self._splitter.open(batch, index)
                parts, flat, vectors = self._splitter.split(run)
            self.num_backwards += 1
            self._check_weightless(vectors, counts[:, c], index)
            sums.append(flat)
            places = torch.arange(start + c, start + N * width, width, device=flat.device)
            scale = torch.where(weights[:, c] > 0, share / weights[:, c], 0.0).to(flat.dtype)
            yield Group(places, weights[:, c], scale, share, flat, parts)
        for c in set(range(width)) - set(columns):
            yield self._empty(start + c, weights[:, c], width)
        if not per_example:
            self._check_columns(batch, index, torch.stack(sums).sum(0))

    def _of_column(self, run: Run, column: int, width: int) -> Tensor:
        """Return the loss's gradient in the outputs as far as one column of its terms goes."""
        outputs, targets = run.evaluation.outputs, run.evaluation.targets
        assert isinstance(outputs, Tensor)
        with session(self._evaluator, run.buffers), no_autocast(self._objective.device):
            (vectors,) = pull_back([run.evaluation.loss], [outputs])
        mask = _column_mask(outputs, targets, self._evaluator.rule, run.num_examples, column, width)
        return torch.zeros_like(outputs) if vectors is None else vectors * mask

    # -- weights and checks -------------------------------------------------------------------------------------------

    def _terms(self, evaluation: Evaluation, N: int, index: int) -> Tensor:
        """Return the weights of the loss terms, (N, terms of an example), float64."""
        rule, outputs = self._evaluator.rule, evaluation.outputs
        assert rule is not None
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"per-example gradients need outputs that are one tensor, got {type(outputs).__name__}; pass forward= "
                "that picks it."
            )
        weights = rule.term_weights(outputs, evaluation.targets).double()
        if weights.ndim == 0 or weights.shape[0] % N:
            raise DataError(
                f"batch {index} has {N} examples along the first dimension of its inputs and loss terms of shape "
                f"{tuple(weights.shape)}; pass forward= that returns targets with the examples along their first "
                "dimension, or rows of them in the order of the examples."
            )
        return weights.reshape(N, -1)

    def _check_weightless(self, vectors: Tensor, weights: Tensor, index: int) -> None:
        N = len(weights)
        if vectors.ndim == 0 or vectors.shape[0] % N or bool((weights > 0).all()):
            return
        if bool(vectors.reshape(N, -1)[weights == 0].count_nonzero()):
            raise DataError(
                f"batch {index} holds examples of weight zero whose loss has a gradient all the same (label smoothing "
                "of a class with weight zero?): a mean over their terms does not exist."
            )

    def _check_columns(self, batch: Any, index: int, total: Tensor) -> None:
        """Compare the sum over targets with the gradient: does the loss come from single outputs only?"""
        evaluator = self._evaluator
        with session(evaluator, evaluator.copy_buffers()), no_autocast(self._objective.device):
            loss = evaluator.evaluate(batch, index).loss
            gradient = flat_gradient(pull_back([loss], self._params), self._params, self._objective.dtype, index)
        eps = coarsest_eps(*self._params)
        if not bool((gradient - total).norm() <= tolerance(1e4 * eps) * (gradient.norm() + total.norm())):
            raise CheckFailedError(
                f"the gradients of single targets do not add up to the gradient of batch {index}: the loss is no sum "
                "of terms that depend on the outputs of one target each. Use per='example'."
            )

    def _empty(self, start: int, weights: Tensor, step: int = 1) -> Group:
        places = start + step * torch.arange(len(weights), device=weights.device)
        zero = torch.zeros(self._objective.num_params, dtype=self._objective.dtype, device=self._objective.device)
        return Group(places, weights, torch.zeros_like(weights).to(zero.dtype), 0.0, zero, ())


def _column_mask(outputs: Tensor, targets: Any, rule: Any, N: int, column: int, width: int) -> Tensor:
    """Return 1 where an output belongs to the loss term of this column, else 0; broadcasts to `outputs`."""
    shape = rule.term_weights(outputs, targets).shape
    mask = torch.zeros(N, width, dtype=outputs.dtype, device=outputs.device)
    mask[:, column] = 1
    mask = mask.view(shape)
    if width == 1 or outputs.shape == shape:
        return mask.view(*shape, *[1] * (outputs.ndim - len(shape))) if outputs.ndim >= len(shape) else mask
    if isinstance(rule, AnyLoss) and not isinstance(rule.loss, nn.NLLLoss):
        raise InputError(
            f"per='target' needs to know which outputs, {tuple(outputs.shape)}, belong to which of the loss terms, "
            f"{tuple(shape)}, and the loss is not one of torch's; use per='example'."
        )
    return mask.unsqueeze(1)
