"""`curvature implicit`: the penalties on gradients that SGD adds to a loss, at a learning rate and a batch size."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from analysis.implicit.figures import plot_penalties, plot_penalty_by_batch_size
from analysis.implicit.measure import (
    ImplicitPlan,
    example_trace_gradient,
    implicit_regularization,
    num_pieces,
    num_products,
    refuse_ranks,
)
from analysis.implicit.results import ImplicitRegularization, PenaltyDirection
from analysis.run.study import Part, Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.environment.cost import median_seconds
from curvature.objective.objective import Objective
from curvature.sharding.tensors import whole

__all__ = ["STUDY", "ImplicitRun"]

_SAMPLE = 4  # pieces that are timed
_SMALL = 0.5  # lr times lambda_max beyond which an expansion in lr says little along the sharpest direction


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitRun(StudyRun):
    """One study of implicit regularization, with what produced it."""

    kind: ClassVar[str] = "implicit"
    result: ClassVar[str] = "implicit"

    implicit: ImplicitRegularization
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self)


def _price(objective: Objective, plan: ImplicitPlan) -> Work:
    refuse_ranks(objective)
    if not plan.directions:
        return Work(gradients=1.0 if plan.batch_size is None else 3.0)
    products, gradients = float(num_products(plan.k)), 8.0  # a third derivative takes six
    if plan.batch_size is None:
        return Work(products=products + 2, gradients=gradients)
    sample = list(itertools.islice(objective.split(1).batches(), _SAMPLE))
    some = objective.replace(data=sample)
    g = whole(some.gradient())

    def run() -> object:
        some.release()  # no graph of an example is kept
        return example_trace_gradient(some, g)

    run()  # the first is slower
    seconds = median_seconds(run, objective.device, objective.ranks) / len(sample)
    pieces = num_pieces(objective, plan.batch_size)
    part = Part(pieces, "pieces of the data", seconds, gradients=3)
    return Work(products=products + 2, gradients=gradients, parts=(part,))


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(run: ImplicitRun) -> Report:
    found = run.implicit
    sections = [_layers(found)]
    if math.isfinite(found.num_examples):
        sections.append(_batch_sizes(found))
    if found.batch is not None and found.full is not None:
        sections.append(_directions(found, found.full, found.batch))
    return Report(
        title="Implicit regularization",
        facts=(f"lr {found.lr:g}", f"batches of {wording.count(found.batch_size)}"),
        cards=_cards(found, decay=bool(run.settings["weight_decay"])),
        findings=_findings(found),
        sections=tuple(sections),
        terms=_TERMS,
        method=_method(found),
        notes=_notes(found),
    )


def _relative(part: float, whole: float) -> str:
    """Return part over whole in per cent, or as a multiple where it is more."""
    ratio = part / whole
    return f"{wording.number(100 * ratio, 3)}{wording.THIN}%" if ratio < 10 else f"{wording.number(ratio, 3)} times"


def _of_loss(part: float, found: ImplicitRegularization) -> str:
    """Return the beginning of a hint; nothing where shares of the loss say nothing."""
    return f"{_relative(part, found.loss)} of the loss; " if found.loss > 0 else ""


def _cards(found: ImplicitRegularization, *, decay: bool) -> tuple[Card, ...]:
    number = wording.number
    stderr = found.batch_factor * found.batch_variance_stderr
    error = f"± {number(stderr, 2)} with other data" if 0 < stderr < math.inf else ""
    cards = [
        Card(label="Loss C", value=number(found.loss), hint="weight decay included" if decay else ""),
        Card(
            label="Variance penalty",
            value=number(found.batch_penalty),
            error=error,
            hint=f"{_of_loss(found.batch_penalty, found)}what the noise of batches adds",
        ),
        Card(
            label="Full-gradient penalty",
            value=number(found.full_penalty),
            hint=f"{_of_loss(found.full_penalty, found)}also in full-batch gradient descent",
        ),
        Card(label="Modified loss", value=number(found.modified_loss), hint="what the mean iterate of SGD descends"),
    ]
    if found.batch is not None:
        rate = found.batch.sharpness_change
        if rate is not None and found.eigenvalues and found.eigenvalues[0] > 0:
            share = 100 * rate * found.lr * found.num_batches / found.eigenvalues[0]
            cards.append(
                Card(
                    label="Change of sharpness",
                    value=f"{number(share, 2)}{wording.THIN}%",
                    hint="change of the largest eigenvalue in an epoch, by the variance penalty",
                )
            )
        cosine = found.batch.cosine_with_gradient
        hint = "between the gradients of variance penalty and loss"
        cards.append(Card(label="Cosine", value=number(cosine, 2), hint=hint))
    if found.eigenvalues:
        hint = "lr times the largest eigenvalue; the theory is of small ones, 2 is the edge of stability"
        cards.append(Card(label="Step on the sharpest", value=number(found.lr * found.eigenvalues[0], 3), hint=hint))
    return tuple(cards)


def _findings(found: ImplicitRegularization) -> tuple[Finding, ...]:
    answers = [
        Finding("What does SGD add to the loss?", _added(found)),
        Finding("Which layers carry the variance penalty?", _payers(found)),
    ]
    if math.isfinite(found.num_examples) and found.loss > 0:
        answers.append(Finding("What would another batch size do?", _elsewhere(found)))
    if found.batch is not None:
        answers.append(Finding("In which direction does it act?", _push(found, found.batch)))
    if found.eigenvalues:
        answers.append(Finding("Does the theory hold here?", _validity(found)))
    return tuple(answers)


def _added(found: ImplicitRegularization) -> str:
    if not found.loss > 0:
        return (
            f"The variance penalty is {wording.number(found.batch_penalty, 3)} and that on the full gradient "
            f"{wording.number(found.full_penalty, 3)}; the loss is not positive, so that shares of it say nothing."
        )
    variance = _relative(found.batch_penalty, found.loss)
    full = _relative(found.full_penalty, found.loss)
    batch = wording.count(found.batch_size)
    text = (
        f"At a learning rate of {found.lr:g} and batches of {batch} the gradient-variance penalty is {variance} of the "
        f"loss, and the penalty on the full gradient {full}.{_epoch(found)}"
    )
    if found.loss > 0 and found.batch_penalty > found.loss:
        text += " It exceeds the loss itself: gradient noise dominates the steps of SGD."
    return text


def _epoch(found: ImplicitRegularization) -> str:
    """Return what an epoch does with the examples that fill no batch."""
    if not math.isfinite(found.num_examples):
        return ""
    N, B = int(found.num_examples), int(found.batch_size)
    if N % B == 0:
        return ""
    whole, rest = N // B, wording.count(N % B)
    if found.drop_last:
        return f" An epoch has {wording.count(whole)} batches and leaves out {rest} examples."
    of = "1 example" if N % B == 1 else f"{rest} examples"
    return f" An epoch has {wording.count(whole)} such batches and a last one of {of}, whose step counts as much."


def _payers(found: ImplicitRegularization) -> str:
    total = float(found.layer_batch_variances.sum())
    if not total > 0:
        return "None: batches do not differ."
    return wording.carriers(found.layers, found.layer_batch_variances.tolist(), "the variance penalty")


def _elsewhere(found: ImplicitRegularization) -> str:
    B, N = int(found.batch_size), int(found.num_examples)
    parts = [
        f"{_relative(found.batch_penalty_at(size), found.loss)} at {wording.count(size)}"
        for size in (B // 2, 2 * B)
        if 1 <= size <= N
    ]
    text = f"The variance penalty would be {' and '.join(parts)}. " if parts else ""
    low = 0.01 * found.loss
    least = 1 + bisect.bisect_left(range(1, N), True, key=lambda B: found.batch_penalty_at(B, drop_last=True) <= low)
    if least == 1:
        return text + "It is below 1 % of the loss at every batch size."
    if least == N:
        return text + "It is above 1 % of the loss at every batch size short of all examples."
    return text + f"From a batch of {wording.count(least)} on, whole batches keep it below 1 % of the loss."


def _push(found: ImplicitRegularization, batch: PenaltyDirection) -> str:
    if batch.norm == 0:
        return "In none: its gradient is zero."
    cosine = batch.cosine_with_gradient
    towards = "against" if cosine < -0.1 else ("along with" if cosine > 0.1 else "at right angles to")
    text = f"Descending the variance penalty goes {towards} descending the loss (cosine {wording.number(cosine, 2)})."
    if batch.cosines_with_top is not None:
        held = float(batch.cosines_with_top.square().sum())
        text += (
            f" {100 * held:.2g}{wording.THIN}% of its square lie in the {len(found.eigenvalues)} sharpest directions."
        )
    if batch.sharpness_change is not None and found.eigenvalues and found.eigenvalues[0] > 0:
        rate = batch.sharpness_change * found.lr * found.num_batches
        share = 100 * rate / found.eigenvalues[0]
        verb = "lowers" if rate < 0 else "raises"
        text += (
            f" To first order it {verb} the largest eigenvalue by {wording.number(abs(share), 2)}{wording.THIN}% "
            "an epoch."
        )
    return text


def _validity(found: ImplicitRegularization) -> str:
    product = found.lr * found.eigenvalues[0]
    text = f"lr · λ is {wording.number(product, 3)} along the sharpest direction"
    if product >= 2:
        return text + ": beyond 2, gradient descent diverges and the expansion in the learning rate does not apply."
    if product > _SMALL:
        return f"{text}, which is not small: there the penalties are right in their order of magnitude only."
    return (
        text + ": small, so the expansion in the learning rate is meaningful for single steps; over an epoch it is "
        f"multiplied by the number of batches, {wording.number(product * found.num_batches, 3)}."
    )


def _layers(found: ImplicitRegularization) -> Section:
    columns = (found.layer_full_penalties, found.layer_batch_penalties)
    total = found.batch_penalty
    rows = tuple(
        (
            name,
            wording.number(full, 3),
            wording.number(noise, 3),
            f"{100 * noise / total:.1f}{wording.THIN}%" if total > 0 else "undefined",
        )
        for name, full, noise in zip(found.layers, *(c.tolist() for c in columns), strict=True)
    )
    return Section(
        title="Layers",
        figures=(
            Figure(
                name="penalties",
                label="Both penalties layer by layer as bars; the table below has the numbers.",
                caption="What each layer adds to both penalties, in units of the loss.",
                draw=lambda ax, colors: plot_penalties(found, ax=ax, colors=colors),
                height=1.3 + 0.3 * len(found.layers),
            ),
        ),
        tables=(
            Table(
                caption="Penalties by layer, in units of the loss.",
                columns=("layer", "full gradient", "variance", "share"),
                rows=rows,
            ),
        ),
    )


def _batch_sizes(found: ImplicitRegularization) -> Section:
    return Section(
        title="Batch sizes",
        figures=(
            Figure(
                name="penalty-by-batch-size",
                label="Loss, full-gradient penalty and variance penalty against the batch size.",
                caption="The variance penalty of whole batches against their size, from the same pass: it falls as "
                "1 / B and vanishes where the batch is all examples, which are drawn without replacement. A short last "
                "batch adds to it (dot).",
                draw=lambda ax, colors: plot_penalty_by_batch_size(found, ax=ax, colors=colors),
            ),
        ),
    )


def _directions(found: ImplicitRegularization, full: PenaltyDirection, batch: PenaltyDirection) -> Section:
    rows = []
    for name, direction in (("full gradient", full), ("variance", batch)):
        change = direction.sharpness_change
        rate = math.nan if change is None else change * found.lr * found.num_batches
        cells = [name, wording.number(direction.norm, 3), wording.number(direction.cosine_with_gradient, 2)]
        cells += [
            wording.number(c, 2)
            for c in ([] if direction.cosines_with_top is None else direction.cosines_with_top.tolist())
        ]
        rows.append((*cells, wording.number(rate, 3)))
    tops = tuple(f"with u{wording.subscript(i)}" for i in range(1, len(found.eigenvalues) + 1))
    return Section(
        title="Directions of the penalties",
        tables=(
            Table(
                caption="Gradients of the penalties: length, cosine with the loss gradient, with the sharpest "
                f"directions (λ = {', '.join(wording.number(v, 3) for v in found.eigenvalues)}), and the change of the "
                "largest eigenvalue that descending it for an epoch brings, to first order.",
                columns=("penalty", "length", "with the gradient", *tops, "change of λ"),
                rows=tuple(rows),
            ),
        ),
    )


_TERMS = (
    (
        "Modified loss",
        "C + lr/4 |∇C|² + lr/4 (1/m) Σ |∇Cₖ − ∇C|² over the m batches of an epoch: the mean over orders of the "
        "iterates after an epoch of SGD lies on the gradient flow of this loss, up to third order in the learning "
        "rate (Smith, Dherin, Barrett and De 2021). The first penalty is that of full-batch descent (Barrett and "
        "Dherin 2020).",
    ),
    (
        "Variance penalty",
        "The last term. A batch of B of N examples contributes (N − B)/(N − 1) Γ/B on average over shuffles, Γ the "
        "variance of single examples' gradients: the factor is that of drawing without replacement. A short last batch "
        "has a larger part and counts as much.",
    ),
    (
        "Change of the largest eigenvalue",
        "Its derivative along the flow of minus the penalty's gradient, by first-order perturbation, times the time "
        "lr·m of an epoch. It needs a third derivative: with ReLU or max-pooling it is that of the smooth piece the "
        "model is in.",
    ),
    ("± with other data", "One standard error over data of the same size, from the spread over single examples."),
)


def _method(found: ImplicitRegularization) -> str:
    if math.isfinite(found.num_examples):
        text = "The variance of single examples' gradients, from one pass, gives the penalty at every batch size."
    else:
        text = "Gradients of the batches gave both penalties; without --batch-size other sizes are not known."
    if found.batch is not None:
        each = "example" if math.isfinite(found.num_examples) else "batch"
        text += f" Gradients of the penalties are Hessian products of each {each} with its own gradient, 2 H g."
    return text


def _notes(found: ImplicitRegularization) -> tuple[str, ...]:
    notes = list(found.notes)
    if found.momentum:
        notes.append(
            "Momentum: factors of Ghosh et al. (2023) for the full gradient; for the noise the argument of Smith et "
            "al. with momentum's weights."
        )
    if not math.isfinite(found.num_examples):
        notes.append("Batches were taken as the task has them.")
    return tuple(notes)


STUDY = Study(record=ImplicitRun, plan=ImplicitPlan, measure=implicit_regularization, price=_price)
