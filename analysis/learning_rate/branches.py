"""Branches: short trainings from one start, each with a learning rate of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from analysis.learning_rate.results import Branch
from analysis.learning_rate.search import Grid, next_place
from analysis.run.draft import POINTS, Draft
from analysis.run.lines import append_line, read_lines
from analysis.training.loop import MakeOptimizer, Snapshot, batches_of, initialise, take_step, training_loss
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["Branches"]

_FAR = 1e6  # times the loss at the start, or 1 where that is larger: a branch that comes there has ended
_TAIL = 4  # the loss of a branch is the mean of the last of so many parts


class Branches:
    """Trainings of one objective from one start.

    Args:
        objective: the loss; its model is in train mode.
        before: what the model holds where all branches begin.
        make: the optimizer of parameters and a rate.
        batch_size: in examples; None takes the batches as they are.
        fresh: draw the parameters anew, by the seed.
        seed: from which the seeds of branches count.
        draft: where branches are kept, so that an interrupted search goes on.
        told: called after each branch, with all of them.

    Raises:
        InputError: for an optimizer that does not take the rate it is given.
    """

    def __init__(
        self,
        objective: Objective,
        before: Snapshot,
        make: MakeOptimizer,
        *,
        batch_size: int | None,
        fresh: bool,
        seed: int,
        draft: Draft | None,
        told: Callable[[list[Branch]], object],
    ) -> None:
        self.objective, self._before, self._make = objective, before, make
        self._batch_size, self._fresh, self._seed = batch_size, fresh, seed
        self._told, self._path = told, None if draft is None else draft.path / POINTS
        self.taken: list[Branch] = []
        self._known = self._read()
        self._starts: dict[int, float] = {}
        once, twice = ([group.get("lr") for group in self.make(lr).param_groups] for lr in (1e-3, 2e-3))
        for a, b in zip(once, twice, strict=True):
            if a is None or b is None or not math.isclose(2 * float(a), float(b), rel_tol=1e-6):
                raise InputError(
                    f"make_optimizer was asked for the rates 0.001 and 0.002 and made a group with {a} and {b}: the "
                    "rate of every group must be the one given, or a fixed multiple of it."
                )

    def begin(self, seed: int) -> None:
        """Put the model where the branches of a seed start, and the random numbers with it."""
        self._before.restore()
        torch.manual_seed(self._seed + seed)
        if self._fresh:
            initialise(self.objective.model)

    def start(self, seed: int) -> float:
        """Return the loss before the first step.

        Raises:
            NonFiniteError: if it is not finite.
        """
        if seed not in self._starts:
            self.begin(seed)
            self._starts[seed] = float(self.objective.loss())
        return self._starts[seed]

    def make(self, lr: float) -> torch.optim.Optimizer:
        """Return a new optimizer."""
        return self._make(list(self.objective.space.tensors.values()), lr)

    def steps(self, seed: int, lr: float, count: int, warmup: int = 0) -> Iterator[tuple[torch.optim.Optimizer, Any]]:
        """Yield, step by step, the optimizer with the rate of the step and a function that returns the batch's loss."""
        self.begin(seed)
        optimizer = self.make(lr)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step, batch in enumerate(batches_of(self.objective, self._batch_size, self._seed + seed)):
            if step == count:
                return
            share = min(1.0, (step + 1) / (warmup + 1))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            yield optimizer, partial(training_loss, self.objective, batch)

    def take(self, seed: int, lr: float, steps: int, warmup: int = 0) -> Branch:
        """Return a branch, from the draft if it was taken before."""
        key = (seed, lr, steps, warmup)
        branch = self._known.get(key)
        if branch is None:
            branch = self._train(seed, lr, steps, warmup)
            if self._path is not None and self._path.parent.is_dir():
                append_line(self._path, json.dumps(vars(branch)))
        self.taken.append(branch)
        self._told(self.taken)
        return branch

    def search(
        self, seed: int, places: Sequence[int], steps: int, grid: Grid, *, depth: int, warmup: int = 0, known: Any = ()
    ) -> dict[int, float]:
        """Return place -> loss of a search.

        Args:
            seed: of the branches.
            places: where it begins.
            steps: of each branch.
            grid: of rates.
            depth: as in `next_place`.
            warmup: of each branch.
            known: place -> loss that are taken as they are.
        """
        losses: dict[int, float] = dict(known)
        start = self.start(seed)
        for place in places:
            losses[place] = self.take(seed, grid.lr(place), steps, warmup).loss
        while (next_one := next_place(losses, start, grid, depth=depth)) is not None:
            losses[next_one] = self.take(seed, grid.lr(next_one), steps, warmup).loss
        return losses

    def _train(self, seed: int, lr: float, steps: int, warmup: int) -> Branch:
        start = self.start(seed)
        seen: list[Tensor] = []
        lost = False
        for optimizer, loss in self.steps(seed, lr, steps, warmup):
            seen.append(take_step(optimizer, loss))
            if not abs(float(seen[-1])) <= _FAR * max(1.0, abs(start)):
                lost = True
                break
        tail = seen[-max(1, steps // _TAIL) :]
        mean = math.inf if lost else float(torch.stack(tail).double().mean())
        return Branch(seed=seed, lr=lr, steps=steps, warmup=warmup, start=start, loss=mean, taken=len(seen))

    def _read(self) -> dict[tuple[int, float, int, int], Branch]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            rows = [Branch(**json.loads(line)) for line in read_lines(self._path, repair=True)]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self._path} cannot be read ({error}); begin again with --overwrite.") from error
        return {(b.seed, b.lr, b.steps, b.warmup): b for b in rows}
