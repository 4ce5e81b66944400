"""Losses, gradients and products of an objective for which no rank holds whole parameters."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvature.data.tensors import move_batch
from curvature.engine.linearize import Linearization
from curvature.errors import CheckFailedError, DataError, NonFiniteError
from curvature.objective.interface import ObjectiveLike
from curvature.objective.module_graph import Pass
from curvature.objective.module_walk import Walk
from curvature.objective.ranks import failing_together
from curvature.objective.shards import Shards
from curvature.parameters import ParameterSpace
from curvature.sharding.collectives import apart
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor

__all__ = [
    "goes_by_module",
    "gradient_of_batch",
    "loss_and_gradient_by_module",
    "loss_by_module",
    "product_by_module",
    "stand_ins",
]


class _LinearisedByModule(Linearization):
    """The loss of a batch, whose products are added to the total of a walk."""

    walk: Walk

    def __init__(self, walk: Walk, *args: Any) -> None:
        self.walk = walk
        super().__init__(*args)
        walk.weight = self.weight

    def _backward_session(self) -> Any:
        return self._session()  # modules run again

    def _products(self, X: Tensor, product: Any, chosen: Sequence[int], which: object = None) -> Tensor:
        del which

        def numbered(x: Tensor) -> Tensor:
            self.walk.row += 1
            found: Tensor = product(x)
            return found

        self.walk.row = -1
        try:
            return super()._products(X, numbered, chosen)
        finally:
            self.walk.row = 0

    def _flatten(self, *_: Any) -> Tensor:
        """Return one number for a vector that nobody reads."""
        return self.walk.parts[0].new_zeros(1)

    def _curve(self, chosen: Sequence[int], x: Tensor) -> Tensor:
        self._build_gradient()
        with self._pass("final"):
            return super()._curve(chosen, x)

    def _push(self, *args: Any) -> Any:
        self._build_jacobian()
        with self._pass("push"):
            return super()._push(*args)

    def _pull(self, *args: Any) -> Tensor:
        with self._pass("final"):
            return super()._pull(*args)

    def gradient(self) -> Tensor:
        with self._pass("final"):
            return super().gradient()

    @contextlib.contextmanager
    def _pass(self, which: Pass) -> Iterator[None]:
        self.walk.which = which
        try:
            yield
        finally:
            self.walk.which = "build"


# -- what an objective asks for ---------------------------------------------------------------------------------------


def stand_ins(shards: Shards, ranks: Any) -> Callable[[], Any]:
    """Return what makes a context in which the plain model runs; module by module, all ranks run it together, once."""
    if not shards.by_module:
        return shards.installed

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        walk = Walk(shards, ranks, None, None)
        with walk.installed():
            yield
        walk.serve()

    return together


def _walked(
    objective: ObjectiveLike,
    what: str,
    of_batch: Callable[[Linearization], Any],
    vectors: Tensor | None = None,
    chosen: Layout | None = None,
) -> tuple[Walk, Tensor, float]:
    """Return a walk with its total, the weighted sum of losses over the ranks, and the divisor of both."""
    shards, ranks = objective.shards, objective.ranks
    assert shards is not None
    assert ranks is not None
    with failing_together(ranks):
        objective.freshness.point()
        with apart():
            walk = Walk(shards, ranks, vectors, chosen, what)
            losses, weight, marks = _added(objective, walk, of_batch)
        _compare(objective, marks)
        walk.give_back()
        ranks.agree("a sum over the data", point=ranks.digests(objective))
    losses, weight = ranks.added(losses, weight)
    if weight == 0:
        raise DataError("the weights of all batches are zero: no target counts (all ignored or masked?).")
    objective._total_weight = weight
    divisor = 1.0 if objective.is_sum else weight
    if walk.total is not None:
        walk.total.div_(divisor)
        if not ranks.everywhere(_is_finite(walk.total), "what has come out"):
            raise NonFiniteError(
                "the gradient or product is not finite although the loss is: the function is not twice differentiable "
                "there (a norm or sqrt at 0?) or overflows; shift the argument or use a wider dtype."
            )
        if walk.num_sums == 0:
            raise CheckFailedError("the loss depends on none of the chosen parameters, on no rank.")
    return walk, losses / divisor, weight


def _is_finite(x: Tensor) -> bool:
    """Whether all entries are, without a copy of them."""
    return x.numel() == 0 or all(map(math.isfinite, torch.stack(torch.aminmax(x)).tolist()))


def _added(
    objective: ObjectiveLike, walk: Walk, of_batch: Callable[[Linearization], Any]
) -> tuple[Tensor, float, list[tuple[int, int, float]]]:
    linearised = _linearised(objective, walk)
    losses, weight = torch.zeros((), dtype=objective.dtype, device=objective.device), 0.0
    marks = []
    for index, mark, batch in walk.in_step(iter(objective.source)):
        lin = linearised(move_batch(batch, objective.device), index)
        if lin.weight != 0:
            losses, weight = losses + lin.weight * lin.loss.to(losses), weight + lin.weight
            of_batch(lin)
        marks.append((index, mark, float(lin.loss)))
        del lin  # before the next graph is built
    return losses, weight, marks


def _linearised(objective: ObjectiveLike, walk: Walk) -> Callable[[Any, int], Linearization]:
    every = list(walk.shards.leaves)
    positions = range(len(every)) if walk.chosen is None else walk.chosen.positions
    space = ParameterSpace({every[i]: walk.parts[i] for i in positions})
    parameters = list(space.tensors.values())
    evaluator = replace(
        objective.evaluator, parameters=parameters, stand_ins=walk.installed, head=None, between_ranks=True
    )
    return functools.partial(_LinearisedByModule, walk, evaluator, space)


def gradient_of_batch(objective: ObjectiveLike, batch: Any, chosen: Layout) -> tuple[float, Tensor]:
    """Return the loss of a batch, and this rank's part of the sum over ranks of the gradients of theirs."""
    assert objective.shards is not None
    with apart():
        walk = Walk(objective.shards, objective.ranks, None, chosen, "a comparison of gradients")
        lin = _linearised(objective, walk)(batch, 0)
        walk.weight, loss = 1.0, float(lin.loss)
        lin.gradient()
        walk.serve()
    assert walk.total is not None
    return loss, walk.total[0]


def _compare(objective: ObjectiveLike, marks: list[tuple[int, int, float]]) -> None:
    """Compare losses with those of earlier walks at this point: the function must repeat."""
    known = objective.freshness.measured().setdefault("losses by module", {})
    eps = torch.finfo(objective.dtype).eps
    for index, mark, loss in marks:
        before = known.setdefault((index, mark), loss)
        if not abs(before - loss) <= 100 * eps * max(abs(loss), eps):
            raise CheckFailedError(
                f"two evaluations of batch {index} at the same parameters differ ({before:.9g}, {loss:.9g}): the model "
                "or its loss draws random numbers from outside torch, or has changed."
            )


def goes_by_module(objective: ObjectiveLike) -> bool:
    """Whether no rank holds whole parameters of the model."""
    return objective.shards is not None and objective.shards.by_module


def loss_by_module(objective: ObjectiveLike) -> Tensor:
    """Return the loss."""
    return _walked(objective, "the loss", lambda _: None)[1]


def loss_and_gradient_by_module(objective: ObjectiveLike, sharding: Layout | None) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient, sharded."""
    assert sharding is not None
    walk, loss, _ = _walked(objective, "a gradient", lambda lin: lin.gradient(), None, sharding)
    assert walk.total is not None
    return loss, ShardedTensor(walk.total[0], sharding)


def product_by_module(
    objective: ObjectiveLike, what: str, of_batch: Callable[[Linearization, Tensor], Any], X: Tensor
) -> Tensor:
    """Return the weighted mean over batches and ranks of products with the rows of X (k, n), sharded."""
    assert isinstance(X, ShardedTensor)
    rows = X.local.contiguous()
    walk, _, _ = _walked(objective, what, lambda lin: of_batch(lin, rows), rows, X.sharding)
    assert walk.total is not None
    return ShardedTensor(walk.total, X.sharding)
