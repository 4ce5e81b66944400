"""The objective: a model, a loss and data as one twice differentiable function of the chosen parameters.

    L(theta) = sum_b w_b l_b(theta) / sum_b w_b

over the batches of the data. Everything else in the toolkit (operators, estimators, optimizers, analyses) sees a model
only through this object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from curvature.arguments import checked
from curvature.autograd.lean_trust import LeanTrust
from curvature.data.batches import DataSource
from curvature.data.tensors import move_batch, tensors_in
from curvature.engine.evaluation import Evaluator, Forward
from curvature.engine.kept_graphs import GraphBudget, KeptGraphs
from curvature.engine.linearize import Linearization
from curvature.environment.device import check_served
from curvature.environment.memory import tensor_bytes
from curvature.errors import DataError, InputError
from curvature.losses.recognised import loss_rule
from curvature.objective.arguments import check_arguments, head_of
from curvature.objective.by_module import goes_by_module, loss_and_gradient_by_module, loss_by_module, stand_ins
from curvature.objective.check import CheckReport, check_objective
from curvature.objective.coupling import Cuts
from curvature.objective.dependence import Dependence
from curvature.objective.freshness import Freshness
from curvature.objective.notes import notes_of
from curvature.objective.ranks import RankAgreement, built_together
from curvature.objective.refusals import refuse_other_batches, refuse_pieces
from curvature.objective.shards import Shards, refuse_by_module, space_of
from curvature.objective.sums import parts_of, sum_of_parts
from curvature.parameters import ParameterSpace, Selection
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import in_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Objective"]


class Objective:
    """The weighted mean loss of a model over a data set, as a function of the chosen parameters.

    Args:
        model: any module that trains with ordinary autograd. It is neither copied nor changed. One that
            `DistributedDataParallel` wraps, whose ranks hold different data, or of which ranks hold parts: by
            `fully_shard`, or as DTensors (see docs/how_to/distributed.md).
        loss: `loss(outputs, targets)` -> scalar, the mean over what the batch counts. With `reduction="sum"` the
            objective is the sum over all batches instead of their weighted mean. None if `forward` returns the scalar
            itself.
        data: one `(inputs, targets)` pair, a list of batches, or a loader that can be iterated again and again.
        params: glob or list of globs over parameter or module names, module or list of modules, list of parameters,
            predicate `(name, tensor) -> bool`, or dict of tensors. Default: all that require a gradient. Tied weights
            count once.
        forward: `forward(model, batch) -> (outputs, targets)`. Default: `(model(batch[0]), batch[1])`.
        head: the last linear layer, or its name, where its logits go into torch's cross-entropy: from 64 MiB of logits
            on both work in blocks of rows, and no tensor of the size of the logits is held. "auto" finds that of
            models with `get_output_embeddings()`, as Hugging Face's have; None leaves the logits whole.
        weight: `weight(batch) -> float`, how much a batch counts. Default: the number of loss terms (targets that are
            not ignored, class weights included), which makes L independent of how the data are cut into batches.
        device: where batches are moved. Default, and only choice that works: where the parameters are.
        process_group: a `torch.distributed` group whose ranks hold different parts of the data; sums run over all
            ranks. All ranks make the same calls; where one fails or differs, all of them raise.
        keep_graphs: True keeps the graph of every batch between products, False builds it anew for each product, "auto"
            keeps as many as fit into `memory_budget`. On a GPU that waits for the host to start kernels, the fifth
            product on a kept graph is captured and later ones are replayed (CUDA graphs), which takes more memory.
        memory_budget: bytes that kept graphs may hold, those of `restrict` and `split` included; the graph that is
            being worked on comes on top. Default: half of what is free, below all limits of the process, as they grow.
            A model in parts is differentiated module by module where six vectors as long as the parameters are more
            than it, or than what a rank finds free; ranks that share a host see the same memory: give each a budget.
        micro_batch: cut batches into pieces of at most this many examples, to bound the memory of one graph: where none
            is kept, a Hessian product holds at most 3 times what the gradient of the same pieces does, one with the
            Gauss-Newton matrix 2.3 times; 4 and 2.4 where attention, tokens by tokens, is most of it. Texts are
            examples: 1 takes them one by one. Activation checkpointing (non-reentrant) works, but lowers the memory of
            gradients only: the graph of a gradient holds what was computed again.
        seed: batch i is evaluated under the random state `seed + i`, so that dropout in train mode is one fixed mask.
        allow_tf32: leave PyTorch's settings for TF32 (GPUs) and bfloat16 (CPUs) as they are. By default products of
            float32 are computed in float32 while graphs are built and applied: TF32 keeps 10 bits, an error of 1e-3.

    Raises:
        DataError: if the data are empty or can be walked only once.
        ParameterSelectionError: if the selection matches nothing.
        InputError: for arguments out of range or of the wrong kind.
    """

    ranks: RankAgreement | None
    shards: Shards | None

    @built_together
    @checked
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        data: Any,
        *,
        params: Selection | None = None,
        forward: Forward | None = None,
        head: nn.Module | str | None = "auto",
        weight: Callable[[Any], float] | None = None,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
        keep_graphs: bool | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
        allow_tf32: bool = False,
    ) -> None:
        check_arguments(model, loss, forward, keep_graphs, memory_budget, micro_batch)
        model = getattr(model, "_orig_mod", model)  # the wrapper of torch.compile has no second derivative
        self.model = model
        by_module = self.shards is not None and self.shards.choose(memory_budget, self.ranks, keep_graphs, head)
        self._space = space_of(model, params, self.shards)
        self.device = self._space.device
        check_served(self.device)
        if device is not None and torch.empty(0, device=device).device != self.device:
            raise InputError(
                f"device={str(device)!r} but the parameters lie on {self.device}; call model.to({str(device)!r}) first."
            )
        self.process_group = process_group
        self.rule = None if loss is None else loss_rule(loss)
        tensors, found = list(self._space.tensors.values()), head_of(model, head)
        self.evaluator = Evaluator(model, self.rule, forward, weight, tensors, seed, allow_tf32, head=found)
        self.evaluator.stand_ins = None if self.shards is None else stand_ins(self.shards, self.ranks)
        self.source = DataSource(
            data, paired=forward is None, micro_batch=micro_batch, may_be_empty=process_group is not None
        )
        self.settings = {"loss": loss, "data": data, "forward": forward, "head": head, "weight": weight}
        self.settings |= {"process_group": process_group, "keep_graphs": keep_graphs, "memory_budget": memory_budget}
        self.settings |= {"micro_batch": micro_batch, "seed": seed, "allow_tf32": allow_tf32}
        self.kept = KeptGraphs(False if by_module else keep_graphs, GraphBudget(memory_budget, self.device))
        self._total_weight: float | None = None
        self.dependence = Dependence()
        self.trust = LeanTrust()
        self.cuts = Cuts()
        self.freshness = Freshness(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: no graphs, which are built again."""
        if self.ranks is not None:
            raise InputError("an objective of several ranks cannot be copied or pickled; build it on each rank.")
        return {key: value for key, value in self.__dict__.items() if key not in ("kept", "freshness")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        budget = GraphBudget(self.settings["memory_budget"], self.device)
        self.kept = KeptGraphs(self.settings["keep_graphs"], budget)
        self.freshness = Freshness(self)

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def space(self) -> ParameterSpace:
        """The chosen parameters: the tensors under their names in the model as it is now."""
        if self._space.follow(self.model):
            self.evaluator.parameters = list(self._space.tensors.values())
        return self._space

    @property
    def num_params(self) -> int:
        return self._space.num_params

    @property
    def sharding(self) -> Layout | None:
        """How vectors lie over ranks, where the model's parameters do; None where each rank holds all of them."""
        return getattr(self._space, "sharding", None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors and results: float32 or wider, whatever the model's dtype."""
        return self._space.dtype

    @property
    def num_batches(self) -> int | None:
        """Number of batches (micro-batches, where they are cut); None before the first pass over a loader."""
        return self.source.num_batches

    @property
    def total_weight(self) -> float:
        """sum_b w_b: the number of loss terms, unless `weight=` says otherwise. Costs a pass if none was made yet."""
        if self._total_weight is None:
            self.loss()
        assert self._total_weight is not None
        return self._total_weight

    @property
    def may_keep_graphs(self) -> bool:
        """Whether graphs are kept at all, as far as memory allows."""
        return self.kept.keep is not False

    @property
    def keeps_all_graphs(self) -> bool:
        """Whether every batch has its graph kept between products, as far as walks over the data have shown."""
        return self.num_batches is not None and len(self.kept) == self.num_batches

    @property
    def shuffles(self) -> bool:
        """Whether the loader was seen to yield its batches in another order."""
        return self.source.shuffles

    @property
    def held_bytes(self) -> int:
        """Bytes that the kept graphs hold at present."""
        return self.kept.held_bytes

    @property
    def has_split(self) -> bool:
        """Whether model and loss are known apart, as the Gauss-Newton matrix and the Fisher need."""
        return self.rule is not None

    @property
    def has_likelihood(self) -> bool:
        """Whether the loss is known to be the negative log-likelihood of a distribution, as the Fisher needs."""
        return self.rule is not None and self.rule.is_likelihood

    @property
    def closed_form_loss(self) -> bool:
        """Whether the loss Hessian on the outputs is known in closed form."""
        return self.rule is not None and self.rule.closed_form

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know: unused parameters, what was kept, which route was taken."""
        return notes_of(self)

    # -- values -------------------------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """Return L, a tensor () of `dtype`. Cost: a forward pass over the data, or nothing where graphs are kept."""
        if goes_by_module(self):
            return loss_by_module(self)
        return self.mean(parts_of(self._linearised(to_differentiate=False), lambda lin: lin.loss.to(self.dtype)))

    def gradient(self) -> Tensor:
        """Return the gradient of L, (n,). Cost: one gradient."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return L and its gradient (n,). Cost: one gradient."""
        if goes_by_module(self):
            return loss_and_gradient_by_module(self, self.sharding)
        walk = self._linearised(plainly=not self.may_keep_graphs)  # lean graphs cost more, and pay with products
        mean = self.mean(parts_of(walk, lambda lin: torch.cat([lin.loss.to(self.dtype)[None], lin.gradient()])))
        return mean[0], in_parts(mean[1:], self.sharding)

    def restrict(self, selection: Selection) -> Objective:
        """Return the objective as a function of some of the parameters only, over the same data."""
        names = self.space.block(selection, self.model).parameters
        restricted = self.replace(params=self._named(names))._sharing_with(self)
        whole = self.dependence.whole or functools.partial(self.replace, params=self._named(self.space.names))
        restricted.dependence = Dependence(whole)
        return restricted

    def split(self, micro_batch: int) -> Objective:
        """Return the same function with its batches cut into pieces of at most so many examples.

        It is the same where the loss of a batch is a mean over its examples; the first use refuses what couples them.
        """
        return self.replace(micro_batch=micro_batch)._sharing_with(self)

    def replace(self, **changes: Any) -> Objective:
        """Return an objective of the same model that is made with the same arguments, but for some."""
        return Objective(self.model, **{"params": self._named(self.space.names), **self.settings, **changes})

    def _named(self, names: Sequence[str]) -> Selection:
        """Return some of the parameters as what selects them; of a model in parts the names do."""
        return list(names) if self.shards is not None else {name: self.space.tensors[name] for name in names}

    def linearise(self, batch: Any, index: int = 0, **recording: Any) -> Linearization:
        """Return the loss of one batch, linearised at the parameters as they are; kept nowhere."""
        refuse_by_module(self.shards, "linearise()")
        return Linearization(self.evaluator, self.space, move_batch(batch, self.device), index, **recording)

    def _sharing_with(self, other: Objective) -> Objective:
        """Return self, with what the other knows of lean layers and of cut batches, and its memory for graphs."""
        self.trust, self.cuts = other.trust, other.cuts
        self.kept = KeptGraphs(other.kept.keep, other.kept.budget)
        return self

    def check(self, *, rtol: float | None = None) -> CheckReport:
        """Verify on this very model and data that products can be trusted; see `objective.check.check_objective`."""
        return check_objective(self, rtol=rtol)

    # -- batches and graphs -------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """Yield the batches on the objective's device."""
        for _, _, batch in self.source:
            refuse_pieces(self)
            yield move_batch(batch, self.device)

    def linearizations(self) -> Iterator[Linearization]:
        """Yield the linearised loss of every batch, from kept graphs where there are any.

        A kept graph belongs to the point it was built at; when anything that the function is made of has changed, all
        graphs are dropped and the operators are those of the present point (`curvature.objective.freshness`).

        Raises:
            CheckFailedError: if no batch depends on the parameters, or forward is found not to repeat.
        """
        return self._linearised()

    def _linearised(self, *, to_differentiate: bool = True, plainly: bool = False) -> Iterator[Linearization]:
        self.freshness.enter()
        self.kept.begin_walk(self.num_params * self.dtype.itemsize)
        built = False
        for index, mark, batch in self._walk():
            if (lin := self.kept.find(index, mark)) is None:
                lin, built = self._linearization(index, mark, batch, plainly), True
            elif self.source.shuffles:  # as a later pass has shown
                refuse_other_batches(self, lin)
            yield lin
            self.dependence.note(lin)
            del lin  # before the next graph is built
        if built:
            self.freshness.leave()
        self.kept.end_walk()
        if to_differentiate:
            self.dependence.require()

    def _walk(self) -> Iterator[tuple[int, int, Any]]:
        if not self.keeps_all_graphs:
            yield from self.source
            return
        self.source.confirm()
        yield from self.kept.batches()

    def _linearization(self, index: int, mark: int, batch: Any, plainly: bool) -> Linearization:
        self.kept.tidy()
        meter, own = self.kept.meter(index), move_batch(batch, self.device)
        lin = self.linearise(own, index, trust=None if plainly else self.trust, meter=meter)
        refuse_other_batches(self, lin)
        self.freshness.built(lin, mark)
        if meter is not None:
            is_copy = own is not batch or not self.source.in_memory
            self.kept.add(mark, own, lin, meter, sum(map(tensor_bytes, tensors_in(own))) if is_copy else 0)
        return lin

    def release(self) -> None:
        """Drop the kept graphs and the memory they hold; the next product builds them again."""
        self.kept.clear()

    # -- reductions ---------------------------------------------------------------------------------------------------

    def reduce(
        self,
        products: Callable[[Linearization], Tensor],
        *,
        observe: Callable[[int, float, Tensor], None] | None = None,
        vectors: Sequence[Tensor] = (),
        sharding: Layout | None = None,
        own: bool = False,
    ) -> Tensor:
        """Return sum_b w_b products(b) / sum_b w_b, over all batches (and ranks).

        Args:
            products: a tensor of one shape for every batch.
            observe: told the place, weight and tensor of each of this rank's batches that count.
            vectors: what is multiplied by; compared over ranks.
            sharding: of the last dimension of what is returned; None for an ordinary tensor, alike on all ranks.
            own: nobody else holds what `products` returns, and the first may become the sum.
        """
        return self.mean(parts_of(self.linearizations(), products, observe), vectors, sharding, own)

    def mean(
        self,
        parts: Iterable[tuple[float, Tensor]],
        vectors: Sequence[Tensor] = (),
        sharding: Layout | None = None,
        own: bool = False,
    ) -> Tensor:
        """Return the weighted mean of (weight, tensor) over batches and ranks, or their sum where the loss sums."""
        if self.ranks is None:
            total, weight, unit = sum_of_parts(parts, own)
            assert total is not None
        else:
            total, weight, unit = self.ranks.summed(self, lambda: sum_of_parts(parts, own), vectors, sharding)
        if weight == 0:
            raise DataError("the weights of all batches are zero: no target counts (all ignored or masked?).")
        self._total_weight = weight
        denominator = 1.0 if self.is_sum else weight
        scaled = total.mul_ if own or self.ranks is not None else total.mul  # what ranks have added is new
        return total if unit == denominator else scaled(unit / denominator)

    @property
    def is_sum(self) -> bool:
        """Whether batches add up (reduction="sum") instead of being averaged."""
        return self.rule is not None and self.rule.reduction == "sum" and self.evaluator.weight is None

    def __repr__(self) -> str:
        return f"Objective({type(self.model).__name__}, {self.num_params} parameters, {self.dtype}, {self.device})"
