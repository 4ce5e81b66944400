"""What the readings of a training run cost its loop, and how long the next one has to wait."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["Budget"]

_TICK = 1e-7  # seconds: no step is shorter, whatever a coarse clock says, and no debt that matters
_SAMPLED = 17  # one in so many rounds is timed, for a look at the clock takes as long as a round of the tracker
_SLOW_ROUNDS = 2  # after a reading, whose data are in the caches in place of the training's
_LATEST = 3  # readings that the next one is judged by
_SEEN = 0.9  # of the budget: what readings do to caches and free memory slows rounds that are not counted as theirs


class Budget:
    """Clocks a loop and what interrupts it.

    All that a tracker does is charged: readings, hooks, and the rounds right after a reading as far as they take longer
    than others. On a CPU the time is that of the process, in which other work of the machine does not count.

    Args:
        share: largest part of the training's time; None for no limit.
        device: where the training runs.
    """

    def __init__(self, share: float | None, device: torch.device) -> None:
        self.share = share
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._loop, self._readings, self._hooks = 0.0, 0.0, 0.0  # seconds; hooks are a part of the loop's
        self._rounds, self._slow_rounds, self._slow = 0, 0, 0.0  # and seconds of those right after readings
        self._costs: list[float] = []
        self._round = 0  # after the latest reading
        self._left = self.clock()

    def begin_round(self) -> float | None:
        """Return when the tracker's part of a round begins, if this round is timed."""
        return None if self._rounds % _SAMPLED else self.clock()

    def end_round(self, begun: float | None) -> None:
        """Count a round that had no reading."""
        self._rounds += 1
        self._round += 1
        if begun is not None:
            self._hooks += _SAMPLED * (self.clock() - begun)
        if self._round == _SLOW_ROUNDS and self._costs:
            self._slow += self.clock() - self._left
            self._slow_rounds += _SLOW_ROUNDS

    def hooked(self, begun: float) -> None:
        """Charge the time since `begun`."""
        self._hooks += self.clock() - begun

    def begin(self) -> float:
        """Return when a reading begins; the clock of the loop stands from here on."""
        begun = self.clock()
        if self._costs:
            self._loop += begun - self._left
            self._rounds += 1
        else:  # what came before the first may be anything
            self._hooks, self._rounds = 0.0, 0
        return begun

    def end(self, begun: float) -> None:
        """Charge a reading; the loop goes on."""
        self._left, self._round = self.clock(), 0
        self._costs = [*self._costs, self._left - begun][-_LATEST:]
        self._readings += self._costs[-1]

    def skip(self, seconds: float) -> None:
        """Leave out time that has nothing to do with the training."""
        self._left += seconds

    def times(self) -> tuple[float, float, float]:
        """Return seconds of the training alone, of readings with what they slow down, and of hooks."""
        if not self._costs:
            return 0.0, 0.0, 0.0
        loop, others = self._so_far(), self._rounds - self._slow_rounds
        slower = 0.0
        if others > 0 and self._slow_rounds:
            slower = max(0.0, self._slow - self._slow_rounds * (loop - self._slow) / others)
        return max(loop - slower - self._hooks, 0.0), self._readings + slower, self._hooks

    def _so_far(self) -> float:
        return self._loop + (self.clock() - self._left if self._costs else 0.0)

    @property
    def expected(self) -> float:
        """Seconds of the next reading."""
        return min(self._costs)

    def steps_to_wait(self, steps: int) -> float:
        """Return the steps until another reading can be paid for, after so many."""
        if self.share is None or not self._costs:
            return 0.0
        share, (training, readings, hooks) = _SEEN * self.share, self.times()
        hooks = min(hooks, share * training / 2)  # half of the budget is left to readings
        missing = (readings + hooks + self.expected) / share - training - _TICK
        return max(0.0, missing / max(training / max(steps, 1), _TICK))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "seconds": (self._so_far(), self._readings, self._hooks, self._slow),
            "rounds": (self._rounds, self._slow_rounds),
            "costs": list(self._costs),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._loop, self._readings, self._hooks, self._slow = state["seconds"]
        self._rounds, self._slow_rounds = state["rounds"]
        self._costs = list(state["costs"])
        self._left, self._round = self.clock(), _SLOW_ROUNDS
