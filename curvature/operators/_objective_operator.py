"""What all matrices of an objective share: shape and place of its parameters, sums over its batches, restriction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import Self

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.engine.output_metrics import OutputMetric
from curvature.errors import DataError, InputError, ParameterSelectionError
from curvature.fingerprints.portable import content
from curvature.linop import SymmetricOperator
from curvature.objective.by_module import goes_by_module, product_by_module
from curvature.objective.objective import Objective
from curvature.objective.product_noise import product_noise
from curvature.objective.ranks import RankAgreement
from curvature.objective.shards import refuse_by_module
from curvature.parameters import Block, Selection
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor, in_parts, whole


class ObjectiveOperator(SymmetricOperator):
    """A symmetric matrix that is a weighted sum over batches; a subclass names the product of a linearised batch."""

    _product: ClassVar[Literal["hvp", "ggnvp"]]
    _works_by_module: ClassVar[bool] = True

    @checked
    def __init__(self, objective: Objective, block: Block | None = None) -> None:
        n = objective.num_params if block is None else block.num_params
        super().__init__((n, n), objective.dtype, objective.device)
        self.objective = objective
        self.block = block

    def _matmat(self, X: Tensor) -> Tensor:
        return self.products([X], [self.block])[0]

    def products(
        self,
        X: Sequence[Tensor],
        blocks: Sequence[Block | None],
        *,
        observe: Callable[[int, float, list[Tensor]], None] | None = None,
    ) -> list[Tensor]:
        """Return A_BB X_B for blocks B of parameters (None: all), (m_B, k_B) each, in one walk over the data.

        Graphs that are not kept are thus built once for all blocks. `observe` is told the place and weight of every
        batch that counts, and its own products.
        """
        if goes_by_module(self.objective):
            if observe is not None or not self._works_by_module:
                refuse_by_module(self.objective.shards, type(self).__name__)
            return [self._by_module(x, block) for x, block in zip(X, blocks, strict=True)]
        if self.objective.ranks is not None:
            self.objective.ranks.agree(self._named(X, blocks))
        rows = [whole(x).T.contiguous() for x in X]
        compared = [r for r, x in zip(rows, X, strict=True) if not isinstance(x, ShardedTensor)]  # others are gathered
        sharding = X[0].sharding if len(X) == 1 and isinstance(X[0], ShardedTensor) else None

        def of_batch(lin: Linearization) -> Tensor:
            parts = [self._of_batch(lin, r, block) for r, block in zip(rows, blocks, strict=True)]
            parts = [p.clone() if p.data_ptr() == r.data_ptr() else p for p, r in zip(parts, rows, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

        def split(packed: Tensor) -> list[Tensor]:
            if len(rows) == 1:
                return [packed.T]
            pieces = packed.split([r.numel() for r in rows])
            return [piece.view(r.shape).T for piece, r in zip(pieces, rows, strict=True)]

        def pass_on(index: int, weight: float, packed: Tensor) -> None:
            assert observe is not None
            observe(index, weight, split(packed))

        told = None if observe is None else pass_on
        found = split(
            self.objective.reduce(of_batch, observe=told, vectors=compared, sharding=sharding, own=observe is None)
        )
        if sharding is not None:
            return found
        return [
            in_parts(y, x.sharding if isinstance(x, ShardedTensor) else None, 0) for x, y in zip(X, found, strict=True)
        ]

    def _named(self, X: Sequence[Tensor], blocks: Sequence[Block | None]) -> str:
        """Return what ranks must have in common that come to a product."""
        what = (f"{x.shape[1]} x {'all parameters' if b is None else b.name}" for x, b in zip(X, blocks, strict=True))
        return f"products of {type(self).__name__} ({', '.join(what)})"

    def _by_module(self, X: Tensor, block: Block | None) -> Tensor:
        every = self.objective.sharding
        assert every is not None
        chosen = every if block is None else every.of(block.positions)
        mine = X if isinstance(X, ShardedTensor) else ShardedTensor(chosen.part(X, 0), chosen, 0)
        what = f"products of {type(self).__name__}"
        if self.objective.ranks is not None and not isinstance(X, ShardedTensor):
            self.objective.ranks.agree(what, vectors=content([X]))
        found = product_by_module(self.objective, what, lambda lin, rows: self._of_batch(lin, rows, None), mine.T).T
        return found if isinstance(X, ShardedTensor) else whole(found)

    @property
    def sharding(self) -> Layout | None:
        every = self.objective.sharding
        return every if every is None or self.block is None else every.of(self.block.positions)

    @property
    def ranks(self) -> RankAgreement | None:
        return self.objective.ranks

    @property
    def made_of(self) -> Tensor:
        """The present values of the parameters, (n,)."""
        return self.objective.space.current()

    @property
    def overhead(self) -> float:
        """What a product costs whatever its columns, in columns: graphs that are not kept, built once for all."""
        objective = self.objective
        if objective.may_keep_graphs and (objective.ranks is not None or not objective.keeps_all_graphs):
            objective.loss()  # builds what can be kept
        kept = objective.keeps_all_graphs
        return 1.0 - float(kept if objective.ranks is None else objective.ranks.everywhere(kept))

    @property
    def product_noise(self) -> float:
        """Relative rounding error of a product; see `objective.product_noise`."""
        classes = [c for c in type(self).__mro__ if issubclass(c, ObjectiveOperator)]
        public = next(c for c in classes if c.__module__.startswith("curvature.operators."))

        def product(objective: Objective, Z: Tensor) -> Tensor:
            other = copy.copy(self)
            other.__class__ = public  # others hold what they know of all data
            other.objective, other.dtype = objective, objective.dtype
            return public._matmat(other, Z)  # no product that anyone counts

        what = public.__name__ if self.block is None else f"{public.__name__} of {self.block.name}"
        key = (public, self.block and self.block.parameters)
        return product_noise(self.objective, what, key, self.shape[0], product)

    def restrict(self, selection: Selection) -> Self:
        """Return the diagonal block of the matrix for some of its parameters, on the same graphs.

        A product with it costs less than one with the whole matrix. The selection holds globs over parameter or module
        names, modules, a predicate, or a `Block` of the objective's space; where it matches none of the parameters,
        `ParameterSelectionError` is raised.
        """
        block = block_within(self.objective, self.block, selection)
        restricted = copy.copy(self)
        restricted.block = block
        restricted.shape = (block.num_params, block.num_params)
        return restricted

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        """Return the product of one batch's matrix, or its diagonal block, with X (k, m), one vector a row."""
        return cast(Tensor, getattr(lin, self._product)(X, block))


class MetricOperator(ObjectiveOperator):
    """sum_b w_b J_b' M_b J_b / sum_b w_b, with J_b the Jacobian of batch b's outputs and M_b a matrix on them."""

    def __init__(self, objective: Objective, metric: OutputMetric, block: Block | None = None) -> None:
        super().__init__(objective, block)
        self._metric = metric

    def _of_batch(self, lin: Linearization, X: Tensor, block: Block | None) -> Tensor:
        return lin.metric_product(X, self._metric, block)


def block_within(objective: Objective, block: Block | None, selection: Selection) -> Block:
    """Return the block of the selected parameters, of those in `block` if it is given."""
    space = objective.space
    chosen = space.block(selection, objective.model)
    if block is None:
        return chosen
    inside = {name: space.tensors[name] for name in chosen.parameters if name in block.parameters}
    if not inside:
        raise ParameterSelectionError(
            f"{', '.join(map(repr, chosen.parameters))} lie outside this diagonal block, which holds "
            f"{', '.join(map(repr, block.parameters))}; restrict the whole matrix instead."
        )
    return space.block(inside)


def check_split(objective: Objective, what: str) -> None:
    """Refuse an objective that does not know model and loss apart."""
    if not objective.has_split:
        raise InputError(
            f"{what} needs the split between model and loss: give the objective loss= and a forward that returns "
            "(outputs, targets), instead of loss=None."
        )


def check_likelihood(objective: Objective, what: str) -> None:
    """Refuse an objective whose loss is not known to be the log-likelihood of a distribution of its targets."""
    check_split(objective, what)
    rule = objective.rule
    if rule is not None and not objective.has_likelihood:
        name = getattr(rule.loss, "__name__", type(rule.loss).__name__)
        raise InputError(
            f"{what} is an expectation over targets drawn from the model's own distribution, which is known for "
            f"torch's cross-entropy, mean squared error and binary cross-entropy with logits, got {name}; use one of "
            "these (CrossEntropyLoss on logits instead of NLLLoss on their log_softmax), or GGNOperator or "
            "EmpiricalFisherOperator, which need no distribution."
        )


def check_fixed_order(objective: Objective, why: str) -> None:
    """Refuse a loader that yields its examples in another order at each pass; walks over it twice, no model."""
    if objective.source.in_memory:
        return
    loader = objective.source.given
    shuffled = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    if not shuffled:
        objective.source.confirm()
    _refuse_order(shuffled or objective.shuffles, why)


def check_order_kept(objective: Objective, why: str) -> None:
    """Refuse linearised batches that have come in another order than before."""
    _refuse_order(objective.shuffles and not objective.keeps_all_graphs, why)


def _refuse_order(shuffled: bool, why: str) -> None:
    if shuffled:
        raise DataError(
            f"the loader shuffles and {why}: every pass would be another matrix. Pass a loader with shuffle=False, or "
            "list(loader)."
        )
