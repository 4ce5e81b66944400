"""Lottery tickets: sub-networks trained again from where the dense network began, against random ones.

Reference: Frankle and Carbin (2019), The lottery ticket hypothesis; Frankle, Dziugaite, Roy and Carbin (2020), Linear
mode connectivity and the lottery ticket hypothesis, for rewinding to a step soon after the beginning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analysis.generalization.pruning.masks import dense_model, sparse_model
from analysis.generalization.pruning.removal import held
from analysis.generalization.pruning.results import TicketRow, Tickets
from analysis.generalization.pruning.scores import PruningMethod, pruning_scores
from analysis.generalization.suited import copy_of
from analysis.show.listener import Progress
from analysis.training.accuracy import accuracy, classifies
from analysis.training.loop import MakeOptimizer, batches_of, initialise, take_step, training_loss
from curvature.arguments import checked
from curvature.data.random_states import random_states_kept
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.objective.objective import Objective

__all__ = ["lottery_tickets"]

_KINDS = ("ticket", "random", "reinitialised")


def _momentum_sgd(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


@checked
def lottery_tickets(
    objective: Objective,
    held_out: Any,
    *,
    sparsities: Sequence[float] = (0.8,),
    num_seeds: int = 5,
    steps: int = 500,
    rewind: int = 0,
    lr: float = 0.1,
    batch_size: int | None = 64,
    iterative: bool = False,
    method: PruningMethod = "magnitude",
    kinds: Sequence[str] = _KINDS,
    make_optimizer: MakeOptimizer = _momentum_sgd,
    generator: AnyGenerator,
    progress: Progress | None = None,
) -> Tickets:
    """Train, prune, rewind and train again, for several seeds, beside random masks and new initial weights.

    For each seed all parameters of the model are drawn anew, also those that the objective leaves out and that are not
    trained; the others are trained for `steps` steps, the rate falling to zero along half a cosine. The lowest scores
    of all tensors together are removed. The weights go back to those after `rewind` steps, buffers included, and the
    sub-network is trained from that step to the end on the same batches. "random" has as many weights a tensor, drawn;
    "reinitialised" has the ticket's mask on weights drawn anew. Pruned weights are no parameters (`sparse_model`): no
    optimizer can bring them back. Sparsity counts tensors of two dimensions or more.

    Cost: 1 + (kinds) x (sparsities) trainings a seed.

    Args:
        objective: whose model is trained, in train mode, on whose data; the model itself stays as it is.
        held_out: data on which the trained networks are judged, in eval mode, as `Objective` takes them: by accuracy
            where targets are classes, of those that are not ignored, else by the loss.
        sparsities: ascending, above 0 and below 1.
        num_seeds: how many trainings of each kind; 2 or more give errors.
        steps: of the optimizer.
        rewind: steps after the beginning to which the weights go back.
        lr: at the beginning.
        batch_size: examples a step; None takes the batches of the data as they are.
        iterative: prune each sparsity from the trained ticket of the one before, not from the dense network.
        method: by whose scores; see `pruning_scores`.
        kinds: of "ticket", "random" and "reinitialised", those to train; a ticket is always trained.
        make_optimizer: `make(params, lr)`; SGD with momentum 0.9 by default. Its weight decay sees kept weights only.
        generator: of the seeds.
        progress: told after each training.

    Raises:
        InputError: for arguments out of range, modules that cannot be initialised, or a training that diverged.
    """
    ladder = [float(s) for s in sparsities]
    if not ladder or sorted(set(ladder)) != ladder or not (ladder[0] > 0 and ladder[-1] < 1):
        raise InputError(f"sparsities must ascend between 0 and 1, got {sparsities}.")
    if num_seeds < 1 or steps < 1 or not 0 <= rewind < steps or not (lr > 0 and math.isfinite(lr)):
        raise InputError(
            "num_seeds and steps must be at least 1, rewind below steps, and lr positive; got "
            f"{num_seeds}, {steps}, {rewind} and {lr}."
        )
    if unknown := sorted(set(kinds) - set(_KINDS)):
        raise InputError(f"kinds must be among {', '.join(_KINDS)}; got {', '.join(unknown)}.")
    objective.source.confirm()  # which shows whether a loader shuffles: all trainings take the same batches
    if objective.shuffles:
        objective = held(objective)
    work = _Tickets(objective, held_out, ladder, steps, rewind, lr, batch_size, iterative, method, make_optimizer)
    also = [kind for kind in _KINDS if kind in {"ticket", *kinds}]
    total, done = num_seeds * (1 + len(also) * len(ladder)), 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("training tickets", done, total)

    drawn = as_generator(generator, objective.device)
    seeds = torch.randint(2**31, (num_seeds,), generator=drawn, device=drawn.device).tolist()
    found: dict[tuple[str, float], list[float]] = {}
    for seed in seeds:
        for key, value in work.of_seed(seed, also, tell).items():
            found.setdefault(key, []).append(value)
    rows = [TicketRow(kind=kind, sparsity=s, values=tuple(values)) for (kind, s), values in found.items()]
    return Tickets(metric=work.metric, rows=tuple(rows), steps=steps, rewind=rewind)


class _Tickets:
    def __init__(
        self,
        objective: Objective,
        held_out: Any,
        ladder: list[float],
        steps: int,
        rewind: int,
        lr: float,
        batch_size: int | None,
        iterative: bool,
        method: PruningMethod,
        make: MakeOptimizer,
    ) -> None:
        self.objective, self.held_out, self.ladder = objective, held_out, ladder
        self.steps, self.rewind, self.lr, self.batch_size = steps, rewind, lr, batch_size
        self.iterative, self.method, self.make = iterative, method, make
        self.metric = "loss"

    def of_seed(self, seed: int, kinds: list[str], tell: Callable[[], None]) -> dict[tuple[str, float], float]:
        with random_states_kept():
            torch.manual_seed(seed)
            start = copy_of(self.objective.model)
            initialise(start)
            other = copy.deepcopy(start)
            initialise(other)  # for masks on new weights
            early, dense = self._train(start, seed, 0)
            found = {("dense", 0.0): self._judged(dense)}
            tell()
            masks: dict[str, Tensor] = {}
            for sparsity in self.ladder:
                masks = self._masks(dense, sparsity, seed, masks if self.iterative else {})
                for kind in kinds:
                    mask = self._drawn(masks, seed) if kind == "random" else masks
                    begin = 0 if kind == "reinitialised" else self.rewind
                    model = sparse_model(other if kind == "reinitialised" else early, mask)
                    _, trained = self._train(model, seed, begin)
                    found[kind, sparsity] = self._judged(trained)
                    tell()
                    if kind == "ticket" and self.iterative:
                        dense = dense_model(trained)
            return found

    def _on(self, model: nn.Module, data: Any = None) -> Objective:
        """Return the objective of another model of the same structure, dense or sparse."""
        chosen, settings = (
            set(self.objective.space.names),
            {**self.objective.settings, "head": "auto", "micro_batch": None},
        )
        for name, p in model.named_parameters():
            p.requires_grad_(name.replace("parametrizations.", "").removesuffix(".original") in chosen)
        settings["data"] = settings["data"] if data is None else data
        return Objective(model, settings.pop("loss"), settings.pop("data"), **settings)

    def _train(self, model: nn.Module, seed: int, begin: int) -> tuple[nn.Module, nn.Module]:
        """Return the model as it is after `rewind` steps and at the end of its training from step `begin`."""
        torch.manual_seed(seed)  # of dropout: what a training draws does not hang on those before it
        model.train()
        here, early = self._on(model), model
        optimizer = self.make([p for p in here.space.tensors.values() if p.numel()], self.lr)
        for step, batch in enumerate(batches_of(here, self.batch_size, seed, begin), begin):
            if step == self.rewind:
                early = copy.deepcopy(model)
            if step == self.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
            loss = take_step(optimizer, partial(training_loss, here, batch))
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the training diverged at step {step}; lower lr, {self.lr:g} now.")
        return early, model

    def _masks(self, trained: nn.Module, sparsity: float, seed: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks of the lowest scores; what was removed before goes first."""
        model = copy.deepcopy(trained).eval()
        scores = pruning_scores(self._on(model), self.method, generator=seed)
        values = scores.scores.clone()
        for name, mask in before.items():
            start, _ = scores.tensors[name]
            values[start : start + mask.numel()][~mask.flatten()] = torch.finfo(values.dtype).min
        scores = replace(scores, scores=values)
        return scores.masks(scores.pruned(sparsity))

    @staticmethod
    def _drawn(masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return masks that keep as many weights of each tensor, drawn."""
        g = torch.Generator().manual_seed(seed)
        return {name: m.flatten()[torch.randperm(m.numel(), generator=g)].view(m.shape) for name, m in masks.items()}

    def _judged(self, model: nn.Module) -> float:
        there = self._on(copy.deepcopy(model).eval(), self.held_out)
        if not classifies(there):
            return float(there.loss())
        self.metric = "accuracy"
        if math.isnan(value := accuracy(there)):
            raise InputError("no label of the held-out data counts in the loss; give examples that are not ignored.")
        return value
