"""`curvature prune`: which weights a loss can lose, and whether its curvature knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from analysis.generalization.pruning.figures import (
    plot_layer_pruning,
    plot_pruning,
    plot_pruning_predictions,
    plot_tickets,
)
from analysis.generalization.pruning.measure import PruningPlan, measure_pruning
from analysis.generalization.pruning.results import ALL, EACH, PruningPoint, PruningRecord, Tickets
from analysis.generalization.pruning.scores import METHODS
from analysis.records.measured import Measured
from analysis.run.preparation import in_groups
from analysis.run.study import Part, Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.environment.cost import timed
from curvature.objective.objective import Objective
from curvature.operators.hessian import HessianOperator

__all__ = ["STUDY", "PruningRun"]

_MOST_LINES = 8
_MOST = 0.5
"""Sparsity up to which rank correlations are told."""


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningRun(StudyRun):
    """One record of pruning, with what produced it."""

    kind: ClassVar[str] = "prune"
    result: ClassVar[str] = "pruning"

    pruning: PruningRecord
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.pruning)


def _price(objective: Objective, plan: PruningPlan) -> Work:
    methods, n = plan.wanted(objective.num_params), objective.num_params
    tensors = sum(t.ndim >= 2 for t in objective.space.tensors.values())
    points = len(methods) * (2 + tensors) * len(plan.sparsities)
    gradients = 10.0 * len(methods) + 3 * points  # losses whose graph is recorded
    if plan.tickets:
        trainings = plan.tickets * (1 + 3 * len(plan.ladder()))
        gradients += trainings * plan.steps * min(1.0, plan.batch_size / max(objective.total_weight, 1.0))
    products = points + ("obs" in methods) * n + ("obs-greedy" in methods) * n
    count, seconds = _in_groups(objective)
    return Work(parts=(Part(products * count, "pieces of the data", seconds, gradients=3),), gradients=gradients)


def _in_groups(objective: Objective) -> tuple[int, float]:
    """Return how many groups the data are in, for errors over the data, and what a product takes in one of them."""
    groups = in_groups(objective)
    A, x = HessianOperator(groups), torch.ones(objective.num_params, dtype=objective.dtype, device=objective.device)
    A @ x  # builds graphs
    count = sum(1 for _ in groups.batches())
    return count, min(timed(partial(A.__matmul__, x), objective.device)[1] for _ in range(3)) / count


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(record: PruningRecord) -> Report:
    prunable = sum(record.layers.values())
    sections = [_together(record), _predictions(record), _layers(record)]
    if record.tickets is not None:
        sections.append(_tickets(record.tickets))
    return Report(
        title="Pruning",
        facts=(
            f"{wording.count(prunable)} of {wording.count(record.num_params)} parameters may be removed",
            f"loss {wording.number(record.loss)}",
        ),
        cards=_cards(record),
        findings=_findings(record),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            "Each method scored all weights once, on data that exclude those held out, and removed those with the "
            "lowest scores: exactly the share asked for, the first in the vector where scores are equal. Sparsity "
            "counts entries of tensors with two dimensions or more; biases and the vectors of normalisation layers are "
            "never removed. Predicted changes contain the linear term; scores do not. Errors over the data are from "
            "the spread of the changes over groups of examples."
        ),
        notes=(
            *record.notes,
            "Weights were removed at once from a trained network, without further training, except of tickets.",
        ),
    )


def _best(record: PruningRecord, sparsity: float) -> PruningPoint | None:
    """Return the point of the smallest true rise when all tensors are ranked together."""
    points = [p for p in record.points if p.layer == ALL and p.sparsity == sparsity]
    return min(points, key=lambda p: p.true, default=None)


def _usual(record: PruningRecord) -> float:
    """Return the sparsity that is told of: the largest up to a half, or the smallest there is."""
    every = sorted({p.sparsity for p in record.points})
    return max((s for s in every if s <= _MOST + 1e-9), default=every[0])


def _bearable(record: PruningRecord) -> tuple[str, float] | None:
    """Return the method and largest sparsity at which the held-out loss did not rise by two standard errors."""
    found = []
    for method in record.methods:
        for p in sorted(record.of(method, ALL), key=lambda p: p.sparsity):
            rise, error = (p.held_out, p.held_out_stderr) if p.held_out == p.held_out else (p.true, p.true_stderr)
            if not (error == error and rise <= 2 * error):
                break
            found.append((p.sparsity, -p.true, method))
    return (max(found)[2], max(found)[0]) if found else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g}{wording.THIN}%"


def _change(value: float, stderr: float) -> str:
    return wording.quantity(Measured(value=value, stderr=0.0 if stderr != stderr else stderr), 3)


def _cards(record: PruningRecord) -> tuple[Card, ...]:
    usual = _usual(record)
    cards = [Card(label="Loss", value=wording.number(record.loss), hint="on the data of the scores")]
    if (best := _best(record, usual)) is not None:
        error = "" if best.true_stderr != best.true_stderr else f"± {wording.number(best.true_stderr, 2)}"
        hint = f"by {best.method}, {_percent(usual)} of all weights removed"
        cards.append(Card(label="Least rise", value=wording.number(best.true, 3), error=error, hint=hint))
        hint = "g'd + ½ d'H d of the same weights"
        error = (
            "" if best.predicted_stderr != best.predicted_stderr else f"± {wording.number(best.predicted_stderr, 2)}"
        )
        cards.append(Card(label="Predicted", value=wording.number(best.predicted, 3), error=error, hint=hint))
        rank = record.rank_correlation(best.method)
        if rank == rank:
            hint = f"Spearman, predicted and true change, over tensors and sparsities to {_percent(_MOST)}"
            cards.append(Card(label="Rank correlation", value=wording.number(rank, 3), hint=hint))
    if (bearable := _bearable(record)) is not None:
        where = "held-out loss" if record.held_out_loss == record.held_out_loss else "loss"
        hint = f"by {bearable[0]}: the {where} rose by less than two standard errors"
        cards.append(Card(label="Free to remove", value=_percent(bearable[1]), hint=hint))
    if record.tickets is not None and len(record.tickets.rows) > 1:
        last = [row for row in record.tickets.rows if row.kind == "ticket"][-1]
        hint = f"{record.tickets.metric} less the dense network's, at {_percent(last.sparsity)}"
        cards.append(Card.of("Ticket", record.tickets.difference("ticket", last.sparsity), hint))
    return tuple(cards)


def _findings(record: PruningRecord) -> tuple[Finding, ...]:
    usual, found = _usual(record), list[Finding]()
    together = sorted((p for p in record.points if p.layer == ALL and p.sparsity == usual), key=lambda p: p.true)
    if together:
        told = ", ".join(f"{_change(p.true, p.true_stderr)} ({p.method})" for p in together)
        text = f"Without {_percent(usual)} of all weights the loss of {wording.number(record.loss)} changes by {told}."
        found.append(Finding("Whose choice costs the least?", text))
    ranks = {m: record.rank_correlation(m) for m in record.methods}
    known = {m: r for m, r in ranks.items() if r == r}
    if known:
        low, high = min(known.values()), max(known.values())
        ends = dict.fromkeys((wording.number(low, 2), wording.number(high, 2)))
        text = (
            f"Over single tensors and sparsities to {_percent(_MOST)}, the quadratic model ranks changes with a "
            f"correlation of {' to '.join(ends)} with the true ones. "
        )
        far = [p for p in record.points if p.predicted > 0 and p.true > 3 * p.predicted and p.true > 3 * p.true_stderr]
        if far:
            first = min(far, key=lambda p: p.true)
            text += (
                f"Its values are too small where much is removed: {wording.count(len(far))} of "
                f"{wording.count(len(record.points))} true changes are more than three times the predicted, from a "
                f"rise of {wording.number(first.true, 2)} on."
            )
        found.append(Finding("Does the quadratic model know?", text.strip()))
    best = together[0].method if together else record.methods[0]
    by_layer = {name: record.of(best, name) for name in record.layers}
    at = {name: p.true for name, points in by_layer.items() for p in points if p.sparsity == usual}
    if len(at) > 1:
        top, least = max(at, key=lambda n: at[n]), min(at, key=lambda n: at[n])
        text = (
            f"{top}: without {_percent(usual)} of its {wording.count(record.layers[top])} weights, chosen by {best}, "
            f"the loss rises by {wording.number(at[top], 3)}; {least} costs {wording.number(at[least], 2)}."
        )
        found.append(Finding("Which tensor is the most sensitive?", text))
    if record.tickets is not None:
        found.append(Finding("Do tickets train as well as the dense network?", _tickets_told(record.tickets)))
    return tuple(found)


def _tickets_told(tickets: Tickets) -> str:
    parts, count = [], len(tickets.rows[0].values)
    sparsity = max(row.sparsity for row in tickets.rows)
    for kind in dict.fromkeys(row.kind for row in tickets.rows[1:]):
        d = tickets.difference(kind, sparsity)
        interval = "" if count < 2 else " (95 %: {} to {})".format(*(wording.number(x, 2) for x in d.interval()))
        parts.append(f"{kind} {wording.number(d.value, 2)}{interval}")
    mean = sum(tickets.rows[0].values) / count
    return (
        f"The dense networks of {count} seeds end at a held-out {tickets.metric} of {wording.number(mean, 3)}. "
        f"Differences with {_percent(sparsity)} of the weights gone: {'; '.join(parts)}."
    )


def _together(record: PruningRecord) -> Section:
    rows = tuple(
        (
            p.method,
            _percent(p.sparsity),
            _change(p.predicted, p.predicted_stderr),
            _change(p.true, p.true_stderr),
            "" if p.held_out != p.held_out else _change(p.held_out, p.held_out_stderr),
            wording.number(p.linear, 2),
        )
        for method in record.methods
        for p in record.of(method, ALL)
    )
    usual = _usual(record)
    ways = tuple(
        (m, *(_change(p.true, p.true_stderr) for way in (ALL, EACH) for p in record.of(m, way) if p.sparsity == usual))
        for m in record.methods
    )
    return Section(
        title="All weights ranked together",
        figures=(
            Figure(
                name="pruning-together",
                label="The rise of the loss against sparsity, a line for each method.",
                caption="The true rise of the loss, with one standard error over the data; dotted on data held out. "
                "Falls have no place on the axis.",
                draw=lambda ax, colors: plot_pruning(record, ax=ax, colors=colors),
            ),
        ),
        tables=(
            Table(
                caption="Changes of the loss, with one standard error over the data.",
                columns=("method", "removed", "predicted", "true", "held out", "linear term"),
                rows=rows,
                signed=(2, 3, 4, 5),
            ),
            Table(
                caption=f"True rise without {_percent(usual)} of the weights: the lowest of all, or of each tensor.",
                columns=("method", "one ranking", "each tensor alike"),
                rows=ways,
                signed=(1, 2),
            ),
        ),
    )


def _predictions(record: PruningRecord) -> Section:
    def cell(method: str, predictor: Any) -> str:
        rank = record.rank_correlation(method, predictor)
        return "" if rank != rank else wording.number(rank, 3)

    predictors = ("predicted", "own", "diagonal", "size")
    rows = tuple((m, *(cell(m, name) for name in predictors), METHODS[m]) for m in record.methods)
    return Section(
        title="Predicted and true changes",
        text="One tensor at a time: how well do the exact quadratic model, the method's own matrix, the Gauss-Newton "
        "diagonal and the size of the removed weights rank what the loss does?",
        figures=(
            Figure(
                name="pruning-predictions",
                label="True changes of the loss against predicted ones on logarithmic axes.",
                caption="One mark for each tensor and sparsity; on the line the quadratic model is exact.",
                draw=lambda ax, colors: plot_pruning_predictions(record, ax=ax, colors=colors),
                height=3.6,
            ),
        ),
        tables=(
            Table(
                caption=f"Spearman's correlation with the true change, tensors and sparsities to {_percent(_MOST)}.",
                columns=("method", "g'd + ½ d'H d", "own matrix", "diagonal", "size", "how it scores"),
                rows=rows,
                num_prose=1,
            ),
        ),
    )


def _layers(record: PruningRecord) -> Section:
    usual = _usual(record)
    best = _best(record, usual)
    shown = [best.method] if best is not None else []
    shown += [m for m in ("magnitude",) if m in record.methods and m not in shown]
    rows = []
    for name, size in record.layers.items():
        cells = [name, wording.count(size)]
        for method in record.methods:
            (point,) = (p for p in record.of(method, name) if p.sparsity == usual)
            cells.append(wording.number(point.true, 2))
        rows.append(tuple(cells))
    return Section(
        title="Tensor by tensor",
        figures=tuple(
            Figure(
                name=f"pruning-layers-{method}",
                label=f"The rise of the loss against sparsity, a line for each tensor, pruned by {method}.",
                caption=f"Each tensor pruned alone, by {method}"
                + (f"; the {_MOST_LINES} that cost the most." if len(record.layers) > _MOST_LINES else "."),
                draw=partial(_draw_layers, record, method),
            )
            for method in shown
        ),
        tables=(
            Table(
                caption=f"True rise of the loss without {_percent(usual)} of the tensor's weights.",
                columns=("tensor", "weights", *record.methods),
                rows=tuple(rows),
            ),
        ),
    )


def _draw_layers(record: PruningRecord, method: str, ax: Any, colors: Any) -> object:
    return plot_layer_pruning(record, method, ax=ax, colors=colors)


def _tickets(tickets: Tickets) -> Section:
    rows = []
    for row in tickets.rows:
        mean = sum(row.values) / len(row.values)
        told = ("", "") if row.kind == "dense" else _difference(tickets.difference(row.kind, row.sparsity))
        rows.append((row.kind, _percent(row.sparsity), wording.number(mean, 4), *told))
    return Section(
        title="Lottery tickets",
        text=f"Networks drawn anew, trained for {wording.count(tickets.steps)} steps, pruned by magnitude, rewound to "
        f"step {wording.count(tickets.rewind)} and trained again.",
        figures=(
            Figure(
                name="pruning-tickets",
                label="Differences to the dense network against sparsity, for each kind of sub-network.",
                caption="Means over seeds and 95 % intervals, of differences to the dense network of the same seed.",
                draw=lambda ax, colors: plot_tickets(tickets, ax=ax, colors=colors),
            ),
        ),
        tables=(
            Table(
                caption=f"Held-out {tickets.metric} at the end of training.",
                columns=("network", "removed", "mean", "less dense", "95 % interval"),
                rows=tuple(rows),
                signed=(3,),
            ),
        ),
    )


def _difference(d: Measured) -> tuple[str, str]:
    if math.isnan(d.stderr):
        return wording.number(d.value, 3), ""
    low, high = d.interval()
    return wording.number(d.value, 3), f"{wording.number(low, 2)} to {wording.number(high, 2)}"


_TERMS = (
    ("Sparsity", "The share of weights removed, of those that may be: entries of tensors of two dimensions or more."),
    (
        "Brain surgeon",
        "Removing weights and moving the others so that the quadratic model of the loss rises least (Hassibi and Stork "
        "1993). Optimal brain damage (LeCun et al. 1990) moves none, and ranks by the diagonal.",
    ),
    ("WoodFisher", "A brain surgeon with the empirical Fisher matrix in blocks (Singh and Alistarh 2020)."),
    (
        "Lottery ticket",
        "A sub-network that, set back to its first weights, trains as well as the dense network (Frankle and Carbin "
        "2019). Random masks keep as many weights of each tensor; “reinitialised” is the ticket's mask on new weights.",
    ),
    (
        "± (uncertainty)",
        "One standard error over data of the same size, for weights chosen and moved as they were. What the choice "
        "owes to the data of the scores shows in the difference to the data held out.",
    ),
)


STUDY = Study(record=PruningRun, plan=PruningPlan, measure=measure_pruning, price=_price, unit="tensors")
