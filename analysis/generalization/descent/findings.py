"""What a curve says, in plain sentences."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from analysis.generalization.descent.results import DescentCurve, Peak
from analysis.show import wording
from analysis.show.report import Finding

__all__ = ["findings"]

_STANDS, _CHANCE = 3.0, 0.01  # standard errors of a peak that is there, and its p-value: few repeats have long tails
_AT = {"width": "width {}", "epochs": "epoch {}", "samples": "{} examples"}


def _at(found: DescentCurve, value: float) -> str:
    """Return a place on the curve in words."""
    form = "{} features" if found.model != "task" and found.vary == "width" else _AT[found.vary]
    return form.format(wording.count(value))


def findings(found: DescentCurve) -> tuple[Finding, ...]:
    """Return questions and answers."""
    told = [
        Finding("Is there a double descent?", f"{_of_loss(found)} {_of_error(found)}"),
        Finding("Where does fitting the wrong labels begin?", _threshold(found)),
    ]
    if np.isfinite(found.of("effective_dimension")).any():
        told.append(Finding("What does curvature see of it?", _curvature(found)))
    if found.vary == "width":
        told.append(Finding("What does counting parameters miss?", _counting(found)))
    told.append(
        Finding("Does the closed form hold?", _closed_form(found))
        if found.model != "task"
        else Finding("Have the networks converged?", _converged(found))
    )
    return tuple(told)


def _of_loss(found: DescentCurve) -> str:
    peak = found.peak("test_loss")
    if peak is None:
        return "No: the mean test loss has no peak among the values tried."
    number = wording.number
    up, down = number(math.exp(peak.rise), 2), number(math.exp(peak.fall), 2)
    said = (
        f"the test loss peaks at {_at(found, peak.value)}: {up} times what it is at {wording.count(peak.before)}, and "
        f"{down} times what it is at {wording.count(peak.after)}; {_stands(peak)}."
    )
    return f"{'Yes' if _sure(peak) else 'Not for sure'}: {said}"


def _of_error(found: DescentCurve) -> str:
    peak = found.peak("test_error")
    if peak is None:
        return "The test error has no peak."
    number = wording.number
    return (
        f"The test error peaks at {wording.count(peak.value)} with {number(100 * peak.height, 3)}{wording.THIN}%, "
        f"{number(100 * peak.rise, 2)} points above its lowest value before and {number(100 * peak.fall, 2)} above "
        f"that after; {_stands(peak)}."
    )


def _stands(peak: Peak) -> str:
    size = wording.number(peak.standing, 2)
    if _sure(peak):
        return f"the smaller of rise and fall is {size} standard errors over {wording.count(peak.dof + 1)} repeats"
    return (
        f"the smaller of rise and fall is {size} standard errors over {wording.count(peak.dof + 1)} repeats, which "
        "chance may bring about"
    )


def _sure(peak: Peak) -> bool:
    return peak.standing >= _STANDS and peak.p_value < _CHANCE


def _threshold(found: DescentCurve) -> str:
    threshold, number = found.threshold, wording.number
    what = "all labels, wrong ones included," if found.label_noise > 0 else "all labels"
    if not threshold.found:
        some = sum(math.isfinite(high) and low > 0 for low, high in threshold.repeats)
        reached = f"{wording.count(some)} of {wording.count(len(threshold.repeats))} repeats cross it"
        return f"Not every repeat fits {what} within the values tried ({reached}); try others, or more steps."
    peak = found.peak("test_loss")
    first, last = _at(found, threshold.lower), _at(found, threshold.upper)  # "width 5 and 9", "297 and 300 features"
    ends = f"{wording.count(threshold.lower)} and {last}" if last[0].isdigit() else f"{first} and {last.split()[-1]}"
    text = f"Between {ends}: {'up to' if found.vary == 'samples' else 'from'} there {what} are fitted."
    if peak is None:
        return text
    off = max(peak.value / threshold.middle, threshold.middle / peak.value)
    index = int(np.flatnonzero(found.values == peak.value)[0])
    error = found.mean("train_error")[0][index]
    if threshold.lower <= peak.value <= threshold.upper:
        return f"{text} The peak of the test loss lies there."
    side = "before" if peak.value < threshold.middle else "beyond"
    left = f", where {number(100 * error, 2)}{wording.THIN}% of the labels are not fitted" if error > 0 else ""
    return f"{text} The peak of the test loss lies a factor of {number(off, 2)} {side} it{left}."


def _curvature(found: DescentCurve) -> str:
    number, values, text = wording.number, found.values, list[str]()
    text += _condition(found)
    beyond = _beyond(found)
    dimension, loss = found.interval("effective_dimension")[0][beyond], found.interval("test_loss")[0][beyond]
    if len(dimension) >= 4 and np.isfinite(dimension).all() and np.isfinite(loss).all():
        rank = float(stats.spearmanr(dimension, loss).statistic)
        where = "From the threshold on" if len(dimension) < len(values) else "Over all values"
        verdict = "tracks the test loss" if rank > 0.7 else "does not track the test loss"
        text.append(
            f"{where} the effective dimension goes from {number(float(dimension[0]), 3)} to "
            f"{number(float(dimension[-1]), 3)} and {verdict} (rank correlation {number(rank, 2)} over "
            f"{wording.count(len(dimension))} values)."
        )
        if found.loss != "squared error":
            text.append(
                "Under cross-entropy curvature shrinks with p (1 - p) as confidence grows: it measures that, too, and "
                "not dimension alone."
            )
    return " ".join(text)


def _condition(found: DescentCurve) -> list[str]:
    condition, resolved = found.interval("condition")[0], found.resolved()
    if not np.isfinite(condition).any():
        return []
    number, threshold = wording.number, found.threshold
    if resolved.all():
        at = float(found.values[int(np.nanargmax(condition))])
        there = threshold.found and threshold.lower <= at <= threshold.upper
        return [f"The condition number is largest at {_at(found, at)}{', at the threshold' if there else ''}."]
    last = int(np.flatnonzero(np.logical_not(resolved))[-1])
    said = (
        f"Up to {_at(found, float(found.values[last]))} the smallest eigenvalues of J J' other than zero lie where "
        "float64 ends, as they do where inputs hardly vary: its condition number is known from below only "
        f"({number(float(np.nanmax(condition)), 1)})."
    )
    if last + 1 < len(condition):
        outputs = wording.count(found.num_classes * found.num_samples)
        said += (
            f" Beyond, it falls from {number(float(condition[last + 1]), 2)} to {number(float(condition[-1]), 2)}: "
            f"there are more parameters than outputs on the training data ({outputs})."
        )
    return [said]


def _beyond(found: DescentCurve) -> slice:
    threshold = found.threshold
    if not threshold.found or found.vary == "samples":
        return slice(None)
    return slice(int((found.values < threshold.upper).sum()), None)


def _counting(found: DescentCurve) -> str:
    number, count = wording.number, wording.count
    params, (error, _) = found.mean("num_params")[0], found.mean("test_error")
    loss = found.interval("test_loss")[0]
    worst = int(np.nanargmax(loss))
    miss, best = worst < len(loss) - 1, int(np.nanargmin(error))
    return (
        f"The largest model has {count(float(params[-1]))} parameters for {count(found.num_samples)} examples, "
        f"{number(float(params[-1]) / found.num_samples, 2)} for each. Its test error is "
        f"{number(100 * float(error[-1]), 3)}{wording.THIN}% and its test loss {number(float(loss[-1]), 3)}; where "
        f"the loss is highest, with {count(float(params[worst]))} parameters, they are "
        f"{number(100 * float(error[worst]), 3)}{wording.THIN}% and {number(float(loss[worst]), 3)}."
        + (" A bound that grows with the number of parameters would order them the other way round." if miss else "")
        + f" The lowest test error of all is at {_at(found, float(found.values[best]))}, "
        + ("beyond" if best > worst else "before" if best < worst else "at")
        + " the highest loss."
    )


def _closed_form(found: DescentCurve) -> str:
    off = found.of("simulated") / found.of("expected") - 1
    z = off.mean(axis=1) / (off.std(axis=1, ddof=1) / math.sqrt(off.shape[1]))
    worst = int(np.nanargmax(abs(z)))
    p = float(2 * stats.t.sf(abs(z[worst]), off.shape[1] - 1)) * len(z)
    return (
        f"{'Yes' if p > 0.01 else 'No'}: the mean test loss over 32 further draws of the labels, over its closed form, "
        f"differs from 1 by at most {wording.number(float(abs(z[worst])), 2)} standard errors over "
        f"{wording.count(off.shape[1])} repeats, at {wording.count(float(found.values[worst]))} (p = "
        f"{wording.number(min(1.0, p), 2)} over all values)."
    )


def _converged(found: DescentCurve) -> str:
    number, unsettled = wording.number, found.unsettled()
    loss = found.mean("train_loss")[0]
    first, last = (number(float(loss[i]), 3) for i in (0, -1))
    ends = f"The training loss ends at {first} at the first value and {last} at the last."
    if found.diverged:
        lost = f"{wording.count(found.diverged)} of {wording.count(len(found.rows))} networks diverged"
        ends += f" {lost}, and means with them are left out: lower --lr."
    if found.vary == "epochs":
        return f"They are watched on their way, so most are not. {ends}"
    if not unsettled:
        return f"Yes, by this measure: each fits its labels, or its gradient has fallen to 3 % of the start's. {ends}"
    shown = ", ".join(wording.count(value) for value in unsettled)
    return (
        f"Not all: at {shown} labels are left unfitted and the gradient has not fallen to 3 % of the start's. These "
        f"points say what {wording.count(found.steps)} steps do, not what the width can do; raise --steps. {ends}"
    )
