"""Products with the Hessian of a small model on all cores: each process holds the graphs of some of the batches.

    H X = sum_i W_i (H_i X) / sum_i W_i

over processes i, with H_i the Hessian of the loss on their batches and W_i the weight of these.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from analysis.run.cores import one_core_each
from analysis.run.pool import Worker
from curvature.objective.objective import Objective
from curvature.operators.hessian import HessianOperator
from curvature.parameters import Block

__all__ = ["SharedHessian", "shared_hessian"]

_ROUNDING = 1e3  # units of rounding by which sums in another order may differ

_Arrays = list["np.ndarray[Any, Any]"]
_Observed = list[tuple[int, float, _Arrays]]


class SharedHessian(HessianOperator):
    """The Hessian of an objective; a product that processes do not answer, or of another point, is made here.

    Args:
        objective: of several batches, all with kept graphs.
        num_processes: how many share the batches, at most one for each.
    """

    def __init__(self, objective: Objective, num_processes: int) -> None:
        super().__init__(objective)
        batches = list(objective.batches())
        ends = [len(batches) * i // num_processes for i in range(num_processes + 1)]
        self._of, self._firsts = objective, ends[:-1]
        self.workers: list[Worker] = []
        try:
            for start, stop in itertools.pairwise(ends):
                self.workers.append(Worker(_Share(objective, batches[start:stop], start)))
            agrees = self._agrees()
        except OSError:  # no more processes may be made, or there is no memory for one
            agrees = False
        except BaseException:
            self.end()
            raise
        if not agrees:
            self.end()
        self._point = objective.freshness.current()

    def products(
        self,
        X: Sequence[Tensor],
        blocks: Sequence[Block | None],
        *,
        observe: Callable[[int, float, list[Tensor]], None] | None = None,
    ) -> list[Tensor]:
        found = None
        if self.objective is self._of and self.workers:
            if self._of.freshness.point() is self._point:  # which raises where it moved within a run
                found = self._shared(X, blocks, observe)
            else:
                self.end()
        return super().products(X, blocks, observe=observe) if found is None else found

    def end(self) -> None:
        """End the processes; later products are made here."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()  # the list that restrictions of this operator have, too

    def _agrees(self) -> bool:
        """Say whether a product is what one process makes of it, up to rounding."""
        v = torch.randn(self.shape[0], 1, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        own, shared = super().products([v], [None])[0], self._shared([v], [None], None)
        bound = _ROUNDING * max(torch.finfo(p.dtype).eps for p in self.objective.space.tensors.values())
        return shared is not None and bool((shared[0] - own).norm() <= bound * own.norm())

    def _shared(
        self,
        X: Sequence[Tensor],
        blocks: Sequence[Block | None],
        observe: Callable[[int, float, list[Tensor]], None] | None,
    ) -> list[Tensor] | None:
        """Return the products, or None if a process failed; then there are none any more."""
        answers = []
        try:
            for worker in self.workers:
                worker.ours.send(([x.detach().numpy() for x in X], list(blocks), observe is not None))
            for worker in self.workers:
                answers.append(worker.ours.recv())
        except (EOFError, OSError):
            answers.append(None)
        if any(answer is None for answer in answers):
            self.end()
            return None
        totals, weight = [torch.zeros_like(x) for x in X], 0.0
        for first, (share, parts, observed) in zip(self._firsts, answers, strict=True):
            for index, of_batch, products in observed if observe is not None else ():
                cast(Any, observe)(first + index, of_batch, [torch.from_numpy(y) for y in products])
            weight += share
            for total, part in zip(totals, parts, strict=True):
                total.add_(torch.from_numpy(part), alpha=1.0 if self.objective.is_sum else share)
        return totals if self.objective.is_sum else [total / weight for total in totals]


class _Share:
    """What a process does: products with the Hessian of its batches, their weight, and those of each batch."""

    def __init__(self, objective: Objective, batches: list[Any], first: int) -> None:
        settings = {"data": batches, "micro_batch": None, "seed": objective.settings["seed"] + first}
        self._objective, self._settings = objective, settings
        self._H: HessianOperator | None = None

    def __call__(self, job: tuple[_Arrays, list[Block | None], bool]) -> tuple[float, _Arrays, _Observed] | None:
        X, blocks, observing = job
        observed: _Observed = []
        weights: list[float] = []

        def observe(index: int, weight: float, products: list[Tensor]) -> None:
            weights.append(weight)
            if observing:
                observed.append((index, weight, [y.numpy().copy() for y in products]))

        try:
            self._H = self._H or HessianOperator(self._objective.replace(**self._settings))
            found = self._H.products([torch.from_numpy(x) for x in X], blocks, observe=observe)
        except Exception:  # raised where the product is made again
            return None
        return sum(weights), [y.numpy() for y in found], observed


@contextlib.contextmanager
def shared_hessian(objective: Objective) -> Iterator[HessianOperator]:
    """Yield the Hessian of an objective, its batches shared out among processes where `one_core_each` says so."""
    with one_core_each(objective) as cores:
        processes = min(cores, objective.num_batches or 1)
        if processes == 1:
            yield HessianOperator(objective)
            return
        H = SharedHessian(objective, processes)
        try:
            yield H
        finally:
            H.end()
