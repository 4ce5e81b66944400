"""Comparing models or checkpoints number by number: which differences are real, and which are the noise of measuring.

Two errors matter. That of the solver (probes, quadrature, residuals) says whether two numbers differ on these data. How
far other data of the same size would move a number says whether the difference tells anything about the models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from scipy.special import stdtr
from torch import Tensor

from analysis.compare.results import Compared, Comparison, Verdict
from analysis.conditioning.results import Conditioning
from analysis.critical.results import CriticalPoint
from analysis.implicit.results import ImplicitRegularization
from analysis.inspection.results import Inspection
from analysis.landscape.results import Landscape
from analysis.noise.results import GradientNoise
from analysis.noise.study import NoiseStudy
from analysis.records.measured import Bounded, Measured
from analysis.sharpness.results import SharpnessTable
from analysis.training.edge import edge_of_stability
from analysis.training.results import TrainingRecord
from curvature.arguments import checked
from curvature.errors import InputError
from curvature.results.intervals import combined_error

__all__ = ["compare_results", "holm", "quantities"]

Quantities = dict[str, tuple[Measured, str]]

_CURVATURE = "loss / parameter²"
_SQUARE = "(loss / parameter)²"
_ROUNDING = 1e-6  # relative, of numbers from products in float32
_FOLLOWS = {  # lambda_1 / mean |lambda|, and the trace is 1 - 2 negative share of the sum of all |lambda|
    "effective condition": ("largest eigenvalue", "trace", "negative share"),
    "largest stable step": ("largest eigenvalue",),
}
"""Numbers that are functions of others."""


@checked
def compare_results(results: Mapping[str, Any], *, level: float = 0.05, same_data: bool | None = None) -> Comparison:
    """Compare what was measured of several models: results of one kind, e.g. several `Inspection`.

    A difference d of two numbers has the p-value of |d| / s under Student's distribution, s the root of the sum of
    squared errors, with Welch's degrees of freedom (`combined_error`): few probes know their own error badly. Positive
    numbers are compared by their square roots, since the error of a mean of squares grows with the mean.
    Verdicts of each kind hold together at the family-wise level by Holm's procedure: with probability 1 - level none
    that says "real" is a false alarm, and likewise none that says "on these data". Errors over data of two models that
    were measured on the same data are positively correlated as a rule, and are added as if they were not: "real" is
    then cautious.

    Args:
        results: by name of the model; all of one type. The first is what others are compared with.
        level: family-wise error level, in (0, 1).
        same_data: whether all were measured on the same data, for the record.

    Raises:
        InputError: for fewer than two results, results of several types, one that has no numbers to compare, or a level
            outside (0, 1).

    Bounds on errors are taken off the difference: residuals, and rounding, a millionth of the numbers. Where they
    explain it, where bounds on the numbers themselves overlap (`Bounded`: ranks, counts, condition numbers), and where
    there is no other error, chance has no part: such numbers take no share of the level, and the notes name those that
    only have bounds. Numbers that follow from others, as the largest stable step does from the largest eigenvalue, are
    tested once one of these is told apart.

    Reference: Holm (1979), A simple sequentially rejective multiple test procedure; Welch (1947).
    """
    if len(results) < 2:
        raise InputError(f"a comparison needs at least two results, got {len(results)}.")
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}.")
    kinds = {type(result) for result in results.values()}
    if len(kinds) > 1:
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"results must be of one kind, got {got}; compare like with like.")
    found = [quantities(result) for result in results.values()]
    names = [name for name in found[0] if any(name in other for other in found[1:])]
    if not names:
        raise InputError("the results share no number; measure the same things of each model.")
    nowhere = Measured(value=math.nan, stderr=math.nan)
    values = [tuple(f[name][0] if name in f else nowhere for f in found) for name in names]
    p_solver = [tuple(_p_value(row[0], other, data=False) for other in row[1:]) for row in values]
    p_data = [tuple(_p_value(row[0], other, data=True) for other in row[1:]) for row in values]
    parents = [[names.index(parent) for parent in _FOLLOWS.get(name, ()) if parent in names] for name in names]
    on_these, real = holm(p_solver, parents, level), holm(p_data, parents, level)
    rows = tuple(
        Compared(
            name=name,
            unit=found[0][name][1],
            values=row,
            p_solver=p_solver[i],
            p_data=p_data[i],
            verdicts=tuple(
                _verdict(p_solver[i][j], on_these[i][j], real[i][j], row[0].value == other.value)
                for j, other in enumerate(row[1:])
            ),
        )
        for i, (name, row) in enumerate(zip(names, values, strict=True))
    )
    left_out = sorted({name for f in found for name in f} - set(names))
    notes = [f"Not measured of all models, and left out: {', '.join(left_out)}."] if left_out else []
    tails = [name for name, result in results.items() if any("eavy tails" in n for n in getattr(result, "notes", ()))]
    if tails:
        notes.append(
            f"Heavy tails, for which errors over data may be too short and alarms too many: {', '.join(tails)}."
        )
    between = [row.name for row in rows if isinstance(row.values[0], Bounded) and set(row.p_solver) == {1.0}]
    if between:
        notes.append(f"Known only within overlapping bounds, and not tested: {', '.join(between)}.")
    if not any(0 < p < 1 for row in rows for p in (*row.p_solver, *row.p_data)):
        notes.append(
            "No number has a random error, so nothing was tested; numbers that differ do so beyond their bounds."
        )
    return Comparison(
        names=tuple(results),
        rows=rows,
        level=level,
        same_data=same_data,
        overlaps=_overlaps(list(results.values())),
        notes=tuple(notes),
    )


def _p_value(a: Measured, b: Measured, *, data: bool) -> float:
    """Return the p-value of a difference; NaN where an error is not known (for `data`: over data), 1 for no test."""
    if not data and isinstance(a, Bounded) and isinstance(b, Bounded) and a.lower <= b.upper and b.lower <= a.upper:
        return 1.0
    bound = sum(m.stderr for m in (a, b) if m.residual) + _ROUNDING * max(abs(a.value), abs(b.value))
    difference = max(abs(a.value - b.value) - bound, 0.0)
    if a.value > 0 and b.value > 0:
        roots = math.sqrt(a.value), math.sqrt(b.value)
        difference /= sum(roots)
        errors = [(s / (2 * root), dof) for root, m in zip(roots, (a, b), strict=True) for s, dof in _errors(m, data)]
    else:
        errors = [*_errors(a, data), *_errors(b, data)]
    spread, dof = combined_error(errors)
    if math.isnan(spread) or math.isnan(difference):
        return math.nan
    if difference == 0 or spread == 0:
        return 1.0 if difference == 0 else 0.0
    return min(float(2 * stdtr(min(dof, 1e15), -difference / spread)), math.nextafter(1.0, 0.0))  # 1 is certain


def _errors(measured: Measured, data: bool) -> list[tuple[float, float]]:
    """Return the standard errors of a number with their degrees of freedom."""
    own = [] if measured.residual else [(measured.stderr, measured.dof)]
    return [*own, (measured.data_stderr, measured.data_dof)] if data else own


def holm(p_values: Sequence[tuple[float, ...]], parents: Sequence[list[int]], level: float) -> list[list[bool]]:
    """Return which differences are significant together: the smallest p at level / m, the next at level / (m - 1)...

    Rows with parents join once one of these is significant: until then all may be equal.
    """
    significant = [[p == 0 for p in row] for row in p_values]  # 0 and 1: no chance is in them
    left = {(p, i, j) for i, row in enumerate(p_values) for j, p in enumerate(row) if 0 < p < 1}
    while tested := [
        (p, i, j) for p, i, j in left if not parents[i] or any(significant[parent][j] for parent in parents[i])
    ]:
        p, i, j = least = min(tested)
        if p > level / len(tested):
            break
        significant[i][j] = True
        left.remove(least)
    return significant


def _verdict(p_solver: float, on_these_data: bool, real: bool, equal: bool) -> Verdict:
    if real:
        return "real"
    if math.isnan(p_solver):
        return "not told apart" if equal else "unknown"
    return "on these data" if on_these_data else "not told apart"


# -- the numbers of each kind of result -------------------------------------------------------------------------------


@singledispatch
@checked
def quantities(result: Any) -> Quantities:
    """Return the numbers of a result that are worth comparing: name -> (value with its errors, unit).

    Errors over data are part of them where they are known. Register further types with `quantities.register`.

    Raises:
        InputError: for a type that nothing is known of.
    """
    raise InputError(
        f"nothing is known of the numbers of {type(result).__name__}; register it with quantities.register."
    )


@quantities.register
def _(result: Inspection) -> Quantities:
    found = {
        "loss": (_exact(result.loss), "loss"),
        "gradient norm": (_exact(result.gradient_norm), "loss / parameter"),
        "largest eigenvalue": (result.sharpness, _CURVATURE),
        "smallest eigenvalue": (result.lowest, _CURVATURE),
        "trace": (result.total_curvature, _CURVATURE),
        "effective condition": (result.effective_condition, ""),
        "negative share": (_share(result), ""),
        "largest stable step": (result.max_stable_lr, "parameter² / loss"),
    }
    for layer in result.layers:
        found[f"{layer.name}: largest eigenvalue"] = (
            Measured(value=layer.top, stderr=layer.top_residual, residual=True),
            _CURVATURE,
        )
        found[f"{layer.name}: trace"] = (layer.trace, _CURVATURE)
    return found


@quantities.register
def _(result: SharpnessTable) -> Quantities:
    rows = {}
    for row in result.rows:
        rows[row.label] = (row.measured, "" if row.unit == "1" else row.unit)
    return {"loss": (_exact(result.loss), "loss"), **rows}


@quantities.register
def _(result: GradientNoise) -> Quantities:
    found = {
        "loss": (_exact(result.loss), "loss"),
        "noise of one example": (_over_data(result.trace), _SQUARE),
        "signal": (_over_data(result.squared_norm), _SQUARE),
        "stopping evidence": (_exact(result.evidence), ""),
        "GSNR": (_exact(result.gsnr), ""),
    }
    for name, trace in zip(result.layers, result.layer_traces.tolist(), strict=True):
        found[f"{name}: noise"] = (_exact(trace), _SQUARE)
    return found


@quantities.register
def _(result: NoiseStudy) -> Quantities:
    found = quantities(result.noise)
    if result.curvature is not None:
        found["tr(H S)"] = (result.curvature.trace_h_sigma, "loss³ / parameter⁴")
        found["noise against curvature, cosine"] = (_unknown(result.curvature.cosine), "")
    return found


@quantities.register
def _(result: ImplicitRegularization) -> Quantities:
    stderr = result.batch_factor * result.batch_variance_stderr
    return {
        "loss": (_exact(result.loss), "loss"),
        "variance penalty": (
            Measured(value=result.batch_penalty, stderr=0.0, data_stderr=stderr, data_dof=result.batch_variance_dof),
            "loss",
        ),
        "full-gradient penalty": (_exact(result.full_penalty), "loss"),
        "modified loss": (_exact(result.modified_loss), "loss"),
    }


@quantities.register
def _(result: Conditioning) -> Quantities:
    found: Quantities = {}
    for condition in (result.whole, *result.preconditioned):
        of = "" if condition is result.whole else f"{condition.name}: "
        if condition.estimated:
            values = (condition.condition, condition.effective_rank, condition.stable_rank)
            for name, measured in zip(("condition number", "effective rank", "stable rank"), values, strict=True):
                found[f"{of}{name}"] = (_unknown(measured.value), "")
            continue
        found[f"{of}condition number"] = (condition.condition, "")
        found[f"{of}effective rank"] = (condition.effective_rank, "")
        found[f"{of}stable rank"] = (condition.stable_rank, "")
    return found


@quantities.register
def _(result: CriticalPoint) -> Quantities:
    return {
        "loss": (_exact(result.loss), "loss"),
        "gradient norm": (_exact(result.gradient_norm), "loss / parameter"),
        "largest eigenvalue": (result.largest, _CURVATURE),
        "smallest eigenvalue": (result.lowest, _CURVATURE),
        "index": (result.index, ""),
    }


@quantities.register
def _(result: Landscape) -> Quantities:
    found = {"loss": (_exact(result.loss), "loss"), "gradient norm": (_exact(result.gradient_norm), "loss / parameter")}
    for s in result.slices:
        found[f"{s.direction.name}: curvature"] = (_exact(s.curvature), "loss")
        found[f"{s.direction.name}: model holds to 10 %"] = (_unknown(s.quadratic_radius(0.1)), "steps")
    return found


@quantities.register
def _(result: TrainingRecord) -> Quantities:
    last, edge = result.readings[-1], edge_of_stability(result)
    own = last.sharpness_residual if math.isnan(last.preconditioned) else last.preconditioned_residual
    error = own / last.threshold
    found = {
        "loss": (_exact(last.loss), "loss"),
        "gradient norm": (_exact(last.gradient_norm), "loss / parameter"),
        "sharpness": (Measured(value=last.sharpness, stderr=last.sharpness_residual, residual=True), _CURVATURE),
        "sharpness over threshold": (Measured(value=last.stability, stderr=error, residual=True), ""),
        "critical sharpness": (_unknown(last.critical_sharpness), _CURVATURE),
        "share of steps above the threshold": (_unknown(edge.share_above), ""),
    }
    for name, value in last.layers.items():
        residual = last.layer_residuals[name]
        found[f"{name}: sharpness"] = (Measured(value=value, stderr=residual, residual=True), _CURVATURE)
    return {name: pair for name, pair in found.items() if not math.isnan(pair[0].value)}


def _share(result: Inspection) -> Measured:
    """Return the negative share; between bounds if most of its error is what the quadrature may have missed."""
    share, total = result.negative_share, abs(result.num_params * result.sharpness.value)  # over the condition
    missed = max(0.0, -result.lowest.value) * abs(result.effective_condition.value)
    if result.exact or not 2 * missed**2 > (share.stderr * total) ** 2:
        return share
    lower, upper = share.interval()
    return Bounded(**vars(share), lower=lower, upper=upper)


def _exact(value: float) -> Measured:
    return Measured(value=value, stderr=0.0)


def _unknown(value: float) -> Measured:
    return Measured(value=value, stderr=math.nan)


def _over_data(measured: Measured) -> Measured:
    """Return a number whose only error is that over other data: on these very data it is exact."""
    return Measured(value=measured.value, stderr=0.0, data_stderr=measured.stderr, data_dof=measured.dof)


def _overlaps(results: Sequence[Any]) -> Tensor | None:
    """Return |U_a' U_b|_F^2 / k of the largest eigenvectors, all pairs; None unless all have some of one network."""
    if not all(isinstance(result, Inspection) for result in results):
        return None
    k = min(result.top.eigenvectors.shape[1] for result in results)
    if k == 0 or len({result.num_params for result in results}) > 1:
        return None
    spaces = [result.top.eigenvectors[:, :k].double() for result in results]
    return torch.stack([torch.stack([(a.T @ b).square().sum() / k for b in spaces]) for a in spaces])
