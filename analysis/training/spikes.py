"""Loss spikes of a training run, and what was seen before them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from analysis.training.results import LossSpike, TrainingRecord
from curvature.errors import InputError

__all__ = ["loss_spikes", "spike_starts"]

_AHEAD = 10  # readings before a spike in which a warning counts
_QUIET = 0.95  # share of quiet readings that the alarm level lies above
_FLOOR = 0.1  # of the loss at the first reading


def loss_spikes(record: TrainingRecord, *, window: int = 20, floor: float | None = None) -> tuple[LossSpike, ...]:
    """Find the readings at which the loss spikes, and say what the readings before them showed.

    A spike begins where the loss of a reading exceeds the median of the `window` readings before by `floor` or more, an
    absolute bound, or is not finite; the next `window` readings belong to it. What warns is the norm of the update over
    its median of the `window` readings before: the signal with the highest AUROC for a spike within 10 steps in
    `benchmarks/tracking`, where preconditioned sharpness over its threshold was no better than chance on one of two
    recipes. Its alarm level is the 95 % quantile of the run's own quiet readings, so one quiet reading in twenty raises
    it, too. Where sharpness crossed its threshold, and in which layer, stands beside it.

    Args:
        record: from a `CurvatureTracker`; a reading at each of the steps of interest.
        window: readings.
        floor: in units of the loss. Default: a tenth of the loss at the first reading.

    Raises:
        InputError: for arguments out of range.

    Example:
        >>> from analysis.training.results import TrainingReading
        >>> losses = [1.0] * 25 + [3.0, 1.0]
        >>> readings = [TrainingReading(step=i, loss=x, update_norm=1.0) for i, x in enumerate(losses)]
        >>> [(s.step, s.rise, s.lead) for s in loss_spikes(TrainingRecord(readings=tuple(readings)))]
        [(25, 2.0, None)]
    """
    if window < 2 or (floor is not None and not 0 < floor < math.inf):
        raise InputError(f"window must be at least 2 and floor positive, got {window} and {floor}.")
    readings = record.readings
    losses = [r.loss for r in readings]
    if len(losses) <= window:
        return ()
    floor = _FLOOR * abs(losses[0]) if floor is None else floor
    begun = spike_starts(losses, window, floor)
    relative = _relative([r.update_norm for r in readings], window)
    near = {i for begin in begun for i in range(begin - _AHEAD, begin + window)}
    quiet = sorted(x for i, x in enumerate(relative) if i >= window and i not in near and math.isfinite(x))
    level = quiet[min(len(quiet) - 1, int(_QUIET * len(quiet)))] if quiet else math.nan
    found = []
    for begin in begun:
        ahead = range(max(0, begin - _AHEAD), begin)
        warned = next((i for i in ahead if relative[i] > level), None)
        crossed = next((i for i in range(begin, max(-1, begin - window), -1) if readings[i].stability > 1), None)
        while crossed is not None and crossed > 0 and readings[crossed - 1].stability > 1:
            crossed -= 1  # to where it came above
        sharp = readings[begin - 1 if crossed is None else crossed]
        before = statistics.median(losses[begin - window : begin])
        found.append(
            LossSpike(
                step=readings[begin].step,
                loss=losses[begin],
                rise=losses[begin] - before,
                level=level,
                warned=None if warned is None else readings[warned].step,
                lead=None if warned is None else readings[begin].step - readings[warned].step,
                crossed=None if crossed is None else readings[crossed].step,
                layer=sharp.sharpest_layer,
                layer_share=sharp.sharpest_layer_share,
            )
        )
    return tuple(found)


def spike_starts(losses: Sequence[float], window: int, floor: float) -> list[int]:
    """Return the places at which spikes begin: above the median of the `window` losses before by more than `floor`."""
    found, i = list[int](), window
    while i < len(losses):
        if losses[i] <= statistics.median(losses[i - window : i]) + floor:
            i += 1
        else:
            found.append(i)
            i += window
    return found


def _relative(values: Sequence[float], window: int) -> list[float]:
    """Return each value over the median of those before it."""
    found = [math.nan] * len(values)
    for i in range(1, len(values)):
        middle = statistics.median(values[max(0, i - window) : i])
        found[i] = values[i] / middle if middle > 0 else math.nan
    return found
