"""Schedules of the learning rate, torch's own, over the budget of a training whatever it is counted in."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim import lr_scheduler as of_torch

__all__ = ["SCHEDULES", "Schedule"]

_TICKS = 1000  # of a budget that is not in steps
_WARM = 0.05  # share of a warm-up

Make = Callable[[Optimizer, int], of_torch.LRScheduler]


def _warmed(optimizer: Optimizer, ticks: int, then: Make) -> of_torch.LRScheduler:
    """Return a linear warm-up over a twentieth, then another schedule over the rest."""
    warm = max(1, round(_WARM * ticks))
    first = of_torch.LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm)
    return of_torch.SequentialLR(optimizer, [first, then(optimizer, max(1, ticks - warm))], milestones=[warm])


def _cosine(optimizer: Optimizer, ticks: int) -> of_torch.LRScheduler:
    return of_torch.CosineAnnealingLR(optimizer, T_max=ticks)


def _restarts(optimizer: Optimizer, ticks: int) -> of_torch.LRScheduler:
    return of_torch.CosineAnnealingWarmRestarts(optimizer, T_0=math.ceil(ticks / 7), T_mult=2)


def _inverse_root(optimizer: Optimizer, ticks: int) -> of_torch.LRScheduler:
    warm = max(1, round(_WARM * ticks))
    return of_torch.LambdaLR(optimizer, lambda t: min((t + 1) / warm, math.sqrt(warm / (t + 1))))


SCHEDULES: dict[str, tuple[str, Make | None]] = {
    "constant": ("the rate stays", None),
    "factor": ("falls to a hundredth by one factor a step", lambda o, n: of_torch.ExponentialLR(o, 0.01 ** (1 / n))),
    "multi-step": (
        "a tenth after one half, a hundredth after three quarters",
        lambda o, n: of_torch.MultiStepLR(o, [max(1, n // 2), max(2, 3 * n // 4)], gamma=0.1),
    ),
    "cosine": ("half a cosine to 0", _cosine),
    "cosine-warmup": ("linear warm-up over a twentieth, then half a cosine to 0", lambda o, n: _warmed(o, n, _cosine)),
    "cosine-restarts": (
        "warm-up, then three half cosines, each twice as long as the one before",
        lambda o, n: _warmed(o, n, _restarts),
    ),
    "inverse-sqrt": ("warm-up over a twentieth, then one over the square root of the step", _inverse_root),
    "linear": ("straight to 0", lambda o, n: of_torch.LinearLR(o, 1.0, 0.0, total_iters=n)),
}
"""Name -> what it does, and how it is made for an optimizer and a number of ticks."""


class Schedule:
    """The schedule of one training; under a budget of n steps it ticks once a step.

    Args:
        name: one of `SCHEDULES`.
        optimizer: whose rates it sets.
        steps: of the training; None where the budget is not in steps.
    """

    def __init__(self, name: str, optimizer: Optimizer, steps: int | None) -> None:
        make = SCHEDULES[name][1]
        self._ticks, self._done = _TICKS if steps is None else steps, 0
        self._schedule = None if make is None else make(optimizer, self._ticks)

    def advance(self, used: float) -> None:
        """Set the rates for the coming step, after this share of the budget."""
        if self._schedule is None:
            return
        while self._done < min(self._ticks, math.floor(used * self._ticks + 1e-9)):
            self._schedule.step()
            self._done += 1
