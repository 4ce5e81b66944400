"""What a measurement spends, as it spends it: products and seconds by stage, and how far its plan has come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from analysis.show.listener import Progress
from curvature.environment.cost import peak_memory
from curvature.environment.device import synchronize

__all__ = ["Cost", "Meter", "StageCost"]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage of a measurement cost."""

    name: str
    """What was computed, in words."""
    planned: int
    """Products that the plan allowed for."""
    num_matvecs: int
    """Products that were spent."""
    seconds: float
    """Wall-clock time, s."""
    whole: bool
    """Whether the products were with the whole Hessian; otherwise with the block of one layer."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measurement did cost."""

    num_matvecs: int
    """Products with the whole Hessian."""
    num_layer_matvecs: int
    """Products with the blocks of layers."""
    seconds: float
    """Wall-clock time, s."""
    peak_bytes: int
    """Largest memory of the process (on CUDA: of torch on the device), bytes."""
    stages: tuple[StageCost, ...]
    """The same, stage by stage."""


class Meter:
    """Counts products and time by stage, and tells the listener how far the plan has come.

    Args:
        device: where the products are made.
        planned: products of all stages together.
        progress: the listener.
    """

    def __init__(self, device: torch.device, planned: int, progress: Progress | None) -> None:
        self.device = device
        self.stages: list[StageCost] = []
        self._progress = progress
        self._start = time.perf_counter()
        self._ahead = planned  # for the stages to come
        self._name, self._planned, self._before, self._done = "", 0, 0, 0

    @contextmanager
    def stage(self, name: str, planned: int, *, whole: bool) -> Iterator[None]:
        """Book what is done inside under a name."""
        self._name, self._planned, self._before = name, planned, self._done
        self._ahead -= planned
        start = time.perf_counter()
        yield
        synchronize(self.device)
        spent, seconds = self._done - self._before, time.perf_counter() - start
        if 0 < spent < planned:  # the bar goes on from what there is
            self._planned = spent
            self._tell()
        self.stages.append(StageCost(name=name, planned=planned, num_matvecs=spent, seconds=seconds, whole=whole))

    def cost(self) -> Cost:
        """Return the sums."""
        return Cost(
            num_matvecs=sum(stage.num_matvecs for stage in self.stages if stage.whole),
            num_layer_matvecs=sum(stage.num_matvecs for stage in self.stages if not stage.whole),
            seconds=time.perf_counter() - self._start,
            peak_bytes=peak_memory(self.device),
            stages=tuple(self.stages),
        )

    def tick(self, columns: int) -> None:
        """Count products that were just made, of the stage that is open."""
        self._done += columns
        self._tell()

    def told(self, stage: str, done: int, total: int) -> None:
        """Take the news of a measurement that is one stage of this."""
        del stage, total
        self._done = self._before + done
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            this_stage = max(self._planned, self._done - self._before)
            self._progress(self._name, self._done, self._before + this_stage + self._ahead)
