"""The graphs that are kept between products, and the memory they may hold.

What a graph holds grows with what is asked of it: a loss needs the forward pass, a Hessian product the graph of the
gradient, a Gauss-Newton product that of the Jacobian. So the budget is looked at each time a graph has grown, whoever
made it grow: graphs, the latest batches first, are given up until the rest fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet, ref

import torch

from curvature.engine.linearize import Linearization
from curvature.environment.memory import HeldMemory, available_memory, keep_freed, return_unused

__all__ = ["BUDGET_SHARE", "GraphBudget", "KeptGraphs"]
BUDGET_SHARE = 0.5  # of the free memory, for kept graphs
_FAULTS = (2**16, 2**25)  # bytes of a vector where page faults slow products down; beyond it memory is what is short
_PATIENCE = 1.0  # s: how long what was found free is believed while graphs fit
_LARGE = 1 << 26  # bytes of kept graphs from which it is worth to give unused memory back ...
_TIDY_SHARE = 0.1  # ... and the share of the time that this may take


class GraphBudget:
    """The bytes that the kept graphs of one objective, and of those made from it, may hold together.

    Args:
        num_bytes: the budget; None for half of what is free, which is looked up anew.
        device: whose memory is meant.
    """

    def __init__(self, num_bytes: int | None, device: torch.device) -> None:
        self._fixed, self._device = num_bytes, device
        self._found, self._looked = 0, -torch.inf
        self._tidied, self._tidying = -torch.inf, 0.0
        self.grown = False
        """Whether graphs have grown since unused memory was given back."""
        self.unchecked = True
        """Whether graphs have grown since it was seen whether they fit."""
        self._stores: WeakSet[KeptGraphs] = WeakSet()

    def admit(self, store: KeptGraphs) -> None:
        """Let the graphs of a store count."""
        self._stores.add(store)

    @property
    def held_bytes(self) -> int:
        """What is held at present."""
        return sum(store.held_bytes for store in self._stores)

    @property
    def num_bytes(self) -> int:
        """What may be held at present."""
        if self._fixed is not None:
            return self._fixed
        self._looked = time.monotonic()
        self._found = int(BUDGET_SHARE * (available_memory(self._device) + self.held_bytes))
        return self._found

    def enforce(self) -> None:
        """Have graphs given up until the rest fits: first those of the objective that was used longest ago."""
        recent = self._fixed is not None or time.monotonic() - self._looked < _PATIENCE
        if recent and not self.unchecked:
            return
        self.unchecked = False
        if recent and self._fixed is None and self.held_bytes <= self._found:
            return
        for store in sorted(self._stores, key=lambda store: store.last_used):
            while len(store) > 0 and self.held_bytes > self.num_bytes:  # what is freed may not be free
                store.drop_last()

    def look_again(self) -> None:
        """Have graphs given up until the rest fits what is free now, whenever that was looked up."""
        self._looked, self.unchecked = -torch.inf, True
        self.enforce()

    def tidy(self, *, now: bool = False, vector_bytes: int = 0) -> None:
        """Give back to the system what graphs and large products left unused; heaps grow to half as much again.

        Args:
            now: whatever share of the time that takes.
            vector_bytes: of a product.
        """
        if not self.grown and vector_bytes < _LARGE:
            return
        if self._device.type != "cpu" or max(self.held_bytes, vector_bytes) < _LARGE:
            self.grown = False
            return
        start = time.monotonic()
        if not now and start - self._tidied < self._tidying / _TIDY_SHARE:
            return
        return_unused()
        self.grown = False
        self._tidied = time.monotonic()
        self._tidying = self._tidied - start


@dataclass
class _Entry:
    mark: int
    batch: Any
    lin: Linearization
    meter: HeldMemory
    own_bytes: int
    size: int = 0

    def measure(self) -> None:
        self.size = self.own_bytes + self.meter.held_bytes()


class KeptGraphs:
    """The linearised batches of an objective whose graphs are kept: the first ones, as many as the budget allows.

    Args:
        keep: True keeps all, False none, "auto" what the budget allows.
        budget: shared by objectives that were made from one another.
    """

    def __init__(self, keep: bool | Literal["auto"], budget: GraphBudget) -> None:
        self.keep, self.budget = keep, budget
        self.last_used = 0.0
        self._entries: list[_Entry] = []
        self._full = self._grew = False
        self._vector_bytes = 0
        budget.admit(self)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Linearization]:
        return iter([entry.lin for entry in self._entries])

    @property
    def held_bytes(self) -> int:
        """Bytes that the kept graphs hold."""
        return sum(entry.size for entry in self._entries)

    def begin_walk(self, vector_bytes: int) -> None:
        """Note that all batches are about to be walked, and how large a gradient is."""
        self._vector_bytes = vector_bytes
        self._full, self.last_used = False, time.monotonic()
        if self.keep == "auto" and self._entries:
            self.budget.enforce()  # the free memory may have shrunk

    def end_walk(self) -> None:
        """Give unused memory back; where graphs have grown, have them fit half of what is free now."""
        if self._grew:
            self.budget.tidy(now=True)
            if self.keep == "auto":
                self.budget.look_again()
        self.budget.tidy(now=self._grew, vector_bytes=self._vector_bytes)
        self._grew = False

    def tidy(self) -> None:
        """Give back what the graph before left unused."""
        self.budget.tidy(vector_bytes=self._vector_bytes)

    def batches(self) -> list[tuple[int, int, Any]]:
        """Return place, mark and batch of every graph, for a walk in which graphs may be dropped."""
        return [(index, entry.mark, entry.batch) for index, entry in enumerate(self._entries)]

    def find(self, index: int, mark: int) -> Linearization | None:
        """Return the graph of the batch in that place; None if there is none, or if it is of another batch now."""
        if index >= len(self._entries):
            return None
        if self._entries[index].mark == mark:
            return self._entries[index].lin
        del self._entries[index:]  # the loader's order changed: graphs kept from here on are of other batches
        return None

    def meter(self, index: int) -> HeldMemory | None:
        """Return what watches the graph of the batch in that place, which is to be kept; None if it is not."""
        if self.keep is False or self._full or index != len(self._entries):
            return None
        store = ref(self)  # no cycle, so that graphs are freed with the objective

        def grown() -> None:
            kept = store()
            if kept is not None:
                kept._grown(meter)

        def room() -> float:
            kept = store()
            return math.inf if kept is None or kept.keep is True else kept.budget.num_bytes - kept.budget.held_bytes

        meter = HeldMemory(grown, room)
        return meter

    def add(self, mark: int, batch: Any, lin: Linearization, meter: HeldMemory, own_bytes: int) -> None:
        """Keep a graph.

        Args:
            mark: fingerprint of its batch.
            batch: the batch, as it was evaluated.
            lin: the graph.
            meter: what watches it.
            own_bytes: of the batch, where nobody else holds it.
        """
        if _FAULTS[0] <= lin.vector_bytes < _FAULTS[1]:
            keep_freed()
        self._entries.append(_Entry(mark, batch, lin, meter, own_bytes))
        self._grown(meter)

    def _grown(self, meter: HeldMemory) -> None:
        entry = next((entry for entry in self._entries if entry.meter is meter), None)
        if entry is not None:
            entry.measure()
            self.budget.grown = self.budget.unchecked = self._grew = True
            if self.keep == "auto":
                self.budget.enforce()

    def drop_last(self) -> None:
        """Give up the latest graph; no other is kept before the next walk."""
        self._entries.pop()
        self._full = self.budget.grown = True

    def clear(self) -> None:
        """Give up all graphs."""
        self._entries.clear()
