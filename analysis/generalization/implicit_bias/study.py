"""`curvature bias`: which of many solutions linear models find on the data of a task, each beside its theorem."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from analysis.generalization.implicit_bias.deep_linear import steps_for, train_deep_linear
from analysis.generalization.implicit_bias.figures import (
    plot_completion,
    plot_deep_linear,
    plot_diagonal_linear,
    plot_label_noise,
)
from analysis.generalization.implicit_bias.measure import ImplicitBiasPlan, data_of, implicit_bias, times_of
from analysis.generalization.implicit_bias.results import DiagonalRun, ImplicitBias
from analysis.run.study import Price, Study, StudyRun
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "ImplicitBiasRun"]

_CLOSE = 1e-3
"""Distance to the solution of least l1 norm that counts as there."""
_SECONDS = 1.0, 8e-5  # of a flow, and of a step of SGD


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitBiasRun(StudyRun):
    """Linear models beside their theorems, and what produced them."""

    kind: ClassVar[str] = "bias"
    result: ClassVar[str] = "bias"

    bias: ImplicitBias
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.bias)


def _price(objective: Objective, plan: ImplicitBiasPlan) -> Price:
    data = data_of(objective, plan, 0)
    seconds = 0.0
    for depth in plan.depths:
        for target, length in zip((data.correlation, data.matrix), times_of(data, plan, depth), strict=True):
            begin = time.perf_counter()
            train_deep_linear(target, depth=depth, scale=plan.scale, time=1e-3, num_points=2)  # a few steps
            few = time.perf_counter() - begin
            begin = time.perf_counter()
            lr = 1 / steps_for(1.0, plan.scale, depth, 1.0)
            train_deep_linear(target, depth=depth, scale=plan.scale, time=100 * lr, num_points=2)
            seconds += max(0.0, time.perf_counter() - begin - few) / 100 * steps_for(1.0, plan.scale, depth, length)
    seconds += plan.starts * _SECONDS[0] + plan.repeats * plan.steps * _SECONDS[1]
    total = 2 * len(plan.depths) + plan.starts + plan.repeats
    return Price(f"{wording.count(total)} trainings of linear models", seconds, total=total, unit="trainings")


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: ImplicitBias) -> Report:
    count = wording.count
    d = len(found.teacher)
    return Report(
        title="Implicit bias",
        facts=(
            f"linear models of {count(d)} inputs",
            f"{_several(len(found.deep), 'depth')}, {_several(len(found.diagonal), 'start')}, "
            f"{_several(len(found.noisy), 'seed')} of label noise",
        ),
        cards=_cards(found),
        findings=_findings(found),
        sections=(_deep(found), _completed(found), _diagonal(found), *_noisy(found)),
        terms=_TERMS,
        method=(
            "The model of the task has no part in this: its inputs, standardised, and its targets are the data of "
            "linear models. Gradient descent on deep ones takes steps of a hundredth over the largest curvature, from "
            "a balanced start whose singular values are all alike; the flow of diagonal ones is integrated until the "
            f"targets are met, those of a teacher with {count(float(found.teacher.sum()))} weights of 1. All in "
            "float64 on the CPU."
        ),
        notes=found.notes,
    )


def _several(number: int, what: str) -> str:
    return f"{wording.count(number)} {what}{'' if number == 1 else 's'}"


def _percent(share: float, digits: int = 2) -> str:
    return f"{wording.number(100 * share, digits)}{wording.THIN}%"


def _layers(depth: int) -> str:
    return _several(depth, "layer")


def _cards(found: ImplicitBias) -> tuple[Card, ...]:
    small, large = found.diagonal[0], found.diagonal[-1]
    number = wording.number
    cards = [
        Card(
            label="Singular values",
            value=_percent(max(run.deviation for run in found.deep)),
            hint="at most from the closed form, over all depths and times",
        ),
        Card(
            label="Hidden entries",
            value=_percent(float(found.completed[-1].hidden_error[-1])),
            hint=f"relative error with {_layers(found.completed[-1].depth)}",
        ),
        Card(
            label="Least l1 norm",
            value=number(small.distance(small.least_l1), 2),
            hint=f"relative distance of the solution from the start {number(small.alpha, 1)}",
        ),
        Card(
            label="Least l2 norm",
            value=number(large.distance(large.least_l2), 2),
            hint=f"relative distance of the solution from the start {number(large.alpha, 1)}",
        ),
    ]
    if found.noisy:
        off = found.noise_deviation()
        cards.append(Card.of("Label noise", off, "of tr H from the flow, mean over the training", percent=True))
    return tuple(cards)


def _findings(found: ImplicitBias) -> tuple[Finding, ...]:
    told = [
        Finding("Does depth learn one direction after the other?", _one_by_one(found)),
        Finding("Does depth find low rank?", _low_rank(found)),
        Finding("Sparse or smooth: what does the size of the start decide?", _sparse(found)),
    ]
    if found.noisy:
        told.append(Finding("Does label noise lead to a flat solution?", _flat(found)))
    return tuple(told)


def _one_by_one(found: ImplicitBias) -> str:
    told = []
    for run in found.deep:
        s = run.expected[-1]
        learnt = [k for k in range(len(s)) if bool((run.singular_values[:, k] > s[0] / 10).any())]
        ratio = math.nan
        if len(learnt) > 1:
            halves = [_half(run, k) for k in (learnt[0], learnt[-1])]
            ratio = halves[1] / halves[0]
        late = "one direction only" if ratio != ratio else f"{wording.number(ratio, 2)} times as late as the first"
        told.append(f"{_layers(run.depth)} {late if ratio != ratio or ratio > 1.05 else 'at the same time'}")
    off = ", ".join(_percent(run.deviation) for run in found.deep)
    return (
        f"The last direction to be learnt comes half way: {', '.join(told)}. The closed form for a balanced start is "
        f"met to {off} of the largest singular value, at all times."
    )


def _half(run: Any, k: int) -> float:
    """Return when a singular value first has half of what it ends at."""
    u = run.singular_values[:, k]
    return float(run.times[int((u >= u[-1] / 2).nonzero()[0])])


def _low_rank(found: ImplicitBias) -> str:
    told = [
        f"{_layers(run.depth)} {_percent(float(run.hidden_error[-1]))} (effective rank "
        f"{wording.number(float(run.effective_rank[-1]), 2)})"
        for run in found.completed
    ]
    off = max(run.rate_deviation for run in found.completed)
    m, n = found.completed[0].product.shape
    seen, free = round((1 - found.hidden) * m * n), found.rank * (m + n - found.rank)
    known = f"{wording.count(seen)} are seen, and matrices of this rank have {wording.count(free)} degrees of freedom"
    one = " One layer leaves them as they began." if any(run.depth == 1 for run in found.completed) else ""
    return (
        f"Of a matrix of rank {wording.count(found.rank)}, {_percent(found.hidden)} of the entries were hidden ({known}"
        f"{', so that several fit' if free >= seen else ''}); the error on these is {', '.join(told)}.{one} Rates of "
        f"the singular values are those of the theorem to {_percent(off)} of the largest."
    )


def _sparse(found: ImplicitBias) -> str:
    number = wording.number
    small, large = found.diagonal[0], found.diagonal[-1]
    l1, l2, teacher = small.distance(small.least_l1), large.distance(large.least_l2), small.distance(found.teacher)
    weights = wording.count(float(found.teacher.sum()))
    text = (
        f"From {number(small.alpha, 1)} the solution is {number(l1, 2)} from that of least l1 norm, from "
        f"{number(large.alpha, 1)} it is {number(l2, 2)} from that of least l2 norm (relative). "
    )
    if l1 > _CLOSE:
        text += (
            f"Its l1 norm is {_percent(small.l1_excess)} above the least: others nearly have that norm, too, and "
            "between these a start must be smaller still. "
        )
    finds = "finds" if teacher < 0.01 else "does not find"
    text += (
        f"With {_several(found.num_examples, 'example')} for {wording.count(len(found.teacher))} weights the small "
        f"start {finds} the {weights} of the teacher (distance {number(teacher, 2)}; from the large start "
        f"{number(large.distance(found.teacher), 2)}). The solution that the theorem names is met to "
        f"{number(max(run.distance(run.expected) for run in found.diagonal), 1)} from every start."
    )
    return text


def _flat(found: ImplicitBias) -> str:
    number, run = wording.number, found.noisy[0]
    begin, least = run.start_trace, run.least_trace
    off, last = found.noise_deviation(), found.last_trace()
    if begin - least <= 0.01 * begin:
        return f"There is nowhere to go: the solution it begins at, tr H {number(begin, 3)}, is the flattest there is."
    share = (begin - last.value) / (begin - least)
    return (
        f"tr H falls from {number(begin, 3)} to {wording.quantity(last, 3)}; the flattest solution has "
        f"{number(least, 3)}, so that {_percent(share)} of the way was made. The effective number of weights falls "
        f"from {number(_effective(run.start), 2)} to {number(_effective(run.solution), 2)}. On the way tr H is "
        f"{_percent(abs(off.value))} {'below' if off.value < 0 else 'above'} the flow of the theorem (± "
        f"{_percent(off.stderr, 1)} over seeds), which is that of vanishing learning rates. Without noise nothing "
        "moves."
    )


def _effective(b: torch.Tensor) -> float:
    """Return |b|_1^2 / |b|_2^2: k for k equal weights."""
    return float(b.abs().sum().square() / b.square().sum())


def _deep(found: ImplicitBias) -> Section:
    def draw(axes: Any, colors: Any) -> None:
        for run, ax in zip(found.deep, axes if len(found.deep) > 1 else [axes], strict=True):
            plot_deep_linear(run, ax=ax, colors=colors)

    rows = tuple(
        (
            _layers(run.depth),
            _percent(run.deviation),
            _percent(run.rate_deviation),
            wording.number(float(run.balance.max()), 1),
            wording.number(float(run.effective_rank.min()), 3),
            wording.number(float(run.effective_rank[-1]), 3),
        )
        for run in found.deep
    )
    return Section(
        title="Depth: one direction after the other",
        text="The correlation of targets and whitened inputs, its largest singular value 1, learnt by a product of "
        "matrices from a balanced start along its singular vectors.",
        figures=(
            Figure(
                name="bias-depth",
                label="Singular values of the product over time for each depth, and the closed form.",
                caption="From two layers on, large singular values are learnt before small ones.",
                draw=draw,
                panels=len(found.deep),
                share_y=True,
            ),
        ),
        tables=(
            Table(
                caption="Largest differences to the closed form and to the theorem's rates, over those of the theorem.",
                columns=("depth", "closed form", "rates", "balance", "least rank", "rank at the end"),
                rows=rows,
            ),
        ),
    )


def _completed(found: ImplicitBias) -> Section:
    def draw(axes: Any, colors: Any) -> None:
        plot_completion(found.completed, ax=axes[0], colors=colors)
        plot_completion(found.completed, quantity="effective_rank", ax=axes[1], colors=colors)

    rows = tuple(
        (
            _layers(run.depth),
            _percent(float(run.hidden_error[-1])),
            wording.number(float(run.effective_rank[-1]), 3),
            wording.number(math.sqrt(2 * float(run.loss[-1])), 2),
            _percent(run.rate_deviation),
        )
        for run in found.completed
    )
    shape = " by ".join(wording.count(n) for n in found.completed[0].product.shape)
    return Section(
        title="Depth: low rank where nothing asks for it",
        text=f"A matrix of {shape}, inputs of some examples at rank {wording.count(found.rank)}, of which "
        f"{_percent(found.hidden)} is hidden from the training.",
        figures=(
            Figure(
                name="bias-completion",
                label="Error on hidden entries, and effective rank, over time for each depth.",
                caption="Left: how well entries are found that were not seen. Right: exp of the entropy of the "
                "singular values' shares.",
                draw=draw,
                panels=2,
            ),
        ),
        tables=(
            Table(
                caption="At the end. Rates: largest difference to the theorem's, over the largest of these.",
                columns=("depth", "hidden entries", "effective rank", "distance to those seen", "rates"),
                rows=rows,
            ),
        ),
    )


def _diagonal(found: ImplicitBias) -> Section:
    number = wording.number

    def cells(run: DiagonalRun) -> tuple[str, ...]:
        distances = (run.distance(to) for to in (run.least_l1, run.least_l2, run.expected, found.teacher))
        return number(run.alpha, 2), *(number(d, 2) for d in distances), _percent(run.l1_excess)

    return Section(
        title="The size of the start: sparse or smooth",
        figures=(
            Figure(
                name="bias-start",
                label="Distance of the solution to those of least l1 norm, least l2 norm and the theorem's, by start.",
                caption="From left to right the solution goes from least l1 to least l2 norm; that of the theorem is "
                "met everywhere.",
                draw=lambda ax, colors: plot_diagonal_linear(found.diagonal, ax=ax, colors=colors),
                height=3.4,
            ),
        ),
        tables=(
            Table(
                caption="Relative distances of the solution, and how far its l1 norm is above the least.",
                columns=("start α", "least l1", "least l2", "least Q", "teacher", "l1 norm above"),
                rows=tuple(map(cells, found.diagonal)),
            ),
        ),
    )


def _noisy(found: ImplicitBias) -> tuple[Section, ...]:
    if not found.noisy:
        return ()
    run, last = found.noisy[0], found.last_trace()
    rows = (
        ("where SGD begins", wording.number(run.start_trace, 4), wording.number(_effective(run.start), 3)),
        ("its last tenth", wording.quantity(last, 3), wording.number(_effective(run.solution), 3)),
        (
            "flow of the theorem",
            wording.number(float(run.expected_trace[-1]), 4),
            wording.number(_effective(run.flow), 3),
        ),
        ("flattest solution", wording.number(run.least_trace, 4), wording.number(_effective(run.expected), 3)),
    )
    return (
        Section(
            title="Label noise: to where it is flat",
            figures=(
                Figure(
                    name="bias-noise",
                    label="tr H along SGD with label noise, the flow of the theorem and the flattest solution.",
                    caption="Shaded: from the lowest to the highest of the seeds. Broken: the flow of the theorem. "
                    "Dotted: the least that any solution has.",
                    draw=lambda ax, colors: plot_label_noise(found.noisy, ax=ax, colors=colors),
                    height=3.2,
                ),
            ),
            tables=(
                Table(
                    caption="tr H, with one standard error over seeds, and effective number of weights (first seed).",
                    columns=("", "tr H", "weights"),
                    rows=rows,
                ),
            ),
        ),
    )


_TERMS = (
    ("Implicit bias", "Of the many solutions that fit the data, training finds some and not others."),
    ("Balanced start", "W_j+1' W_j+1 = W_j W_j' for neighbouring layers; the flow keeps it."),
    ("Effective rank", "exp of the entropy of the singular values' shares: k for k equal ones."),
    ("Start α", "Diagonal networks have weights b = u² − v², and u = v = α at the start."),
    ("Least Q", "The solution that theory names: Q goes from the l1 norm (small α) to the l2 norm (large α)."),
    ("tr H", "Trace of the Hessian of the loss: here a weighted l1 norm of the weights."),
    ("Effective number of weights", "|b|₁² / |b|₂²: k for k equal weights."),
)


STUDY = Study(record=ImplicitBiasRun, plan=ImplicitBiasPlan, measure=implicit_bias, price=_price, unit="trainings")
