"""The edge of stability: which phase a run is in, from readings of its sharpness and thresholds alone."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from analysis.training.results import EdgeOfStability, Phase, TrainingReading, TrainingRecord
from curvature.errors import InputError

__all__ = ["edge_of_stability"]

_AHEAD = 10  # parts of a run that are compared to see whether it sharpens
_RISEN = 1.01  # times the loss before: a rise


def edge_of_stability(record: TrainingRecord, *, low: float = 0.9, high: float = 1.2) -> EdgeOfStability:
    """Compare a run's sharpness with the threshold of its optimizer, reading by reading.

    With r = (preconditioned) sharpness over threshold, a reading is at the EDGE for low <= r <= high. Below, it is
    SHARPENING where r is higher a tenth of all readings later (at its end: than then), else BELOW. Above `high` it is
    UNSTABLE if no later reading comes back to `high` or less, or if its loss is not finite; else a CATAPULT if the loss
    rises before that, and ABOVE if it does not, as in the first steps of Adam, whose averages are young. In full-batch
    training r rises to about 1 and stays there.

    Args:
        record: with the quantity "sharpness" or "preconditioned", from a tracker that knows the optimizer.
        low: from where on r counts as at the edge. On tanh networks r lay between 0.90 and 1.11 once it was there.
        high: up to where it does.

    Raises:
        InputError: without readings, or unless 0 < low <= 1 <= high.

    Reference: Cohen et al. (2021), arXiv 2103.00065; Lewkowycz et al. (2020), The large learning rate phase of deep
    learning: the catapult mechanism (arXiv 2003.02218).
    """
    if not 0 < low <= 1 <= high:
        raise InputError(f"low and high must enclose 1, got {low} and {high}.")
    readings = record.readings
    if not readings:
        raise InputError("the record holds no reading; let the tracker take some.")
    ratios = [reading.stability for reading in readings]
    phases = tuple(_phase(i, readings, ratios, low, high) for i in range(len(readings)))
    weights = [later.interval for later in readings[1:]]
    weights.append(weights[-1] if weights else 1)  # a reading stands for the steps until the next
    known = [i for i, r in enumerate(ratios) if math.isfinite(r)]
    first = next((j for i, j in pairwise(known) if ratios[i] < 1 <= ratios[j]), None)
    if first is None and known and min(ratios[i] for i in known) >= 1:
        first = known[0]
    mean = std = math.nan
    if first is not None:
        there = [i for i in known if i >= first]
        w = torch.tensor([float(weights[i]) for i in there], dtype=torch.float64)
        r = torch.tensor([ratios[i] for i in there], dtype=torch.float64)
        mean = float((w * r).sum() / w.sum())
        std = float((w * (r - mean).square()).sum().div(w.sum()).sqrt())
    swings = [s.oscillation for s, phase in zip(readings, phases, strict=True) if phase is Phase.EDGE]
    swings = [s for s in swings if math.isfinite(s)]
    steps = sum(weights[i] for i in known)
    return EdgeOfStability(
        phases=phases,
        arrival=None if first is None else readings[first].step,
        mean=mean,
        std=std,
        share_above=sum(weights[i] for i in known if ratios[i] > 1) / steps if steps else math.nan,
        oscillation=float(torch.tensor(swings).median()) if swings else math.nan,
    )


def _phase(i: int, readings: tuple[TrainingReading, ...], ratios: list[float], low: float, high: float) -> Phase:
    if math.isinf(readings[i].loss) or math.isnan(readings[i].loss):
        return Phase.UNSTABLE
    r = ratios[i]
    if math.isnan(r):
        return Phase.UNKNOWN
    if r > high:
        back = next((j for j in range(i + 1, len(ratios)) if ratios[j] <= high), None)
        if back is None:
            return Phase.UNSTABLE
        begun = next((j + 1 for j in range(i - 1, -1, -1) if not ratios[j] > high), 0)  # of the whole excursion
        between = [max(s.loss, s.highest_loss) for s in readings[begun + 1 : back + 1]]
        return Phase.CATAPULT if max(between) > _RISEN * readings[begun].loss else Phase.ABOVE
    if r >= low:
        return Phase.EDGE
    ahead = max(1, len(ratios) // _AHEAD)
    here = max(0, min(i, len(ratios) - 1 - ahead))
    rising = len(ratios) > 1 and ratios[here + ahead] > ratios[here]
    return Phase.SHARPENING if rising else Phase.BELOW
