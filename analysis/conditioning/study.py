"""`curvature conditioning`: how unequal curvatures are, layer by layer, and what preconditioners would gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from analysis.conditioning.figures import plot_conditioning, plot_effective_dimension
from analysis.conditioning.measure import ConditioningPlan, measure_conditioning
from analysis.conditioning.results import Condition, Conditioning
from analysis.records.measured import Bounded, Measured
from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "ConditioningRun"]

_ACCURACY = 0.01  # of the steps that are spoken of: to a hundredth of the distance


@dataclass(frozen=True, kw_only=True, repr=False)
class ConditioningRun(StudyRun):
    """One study of conditioning, with what produced it."""

    kind: ClassVar[str] = "conditioning"
    result: ClassVar[str] = "conditioning"

    conditioning: Conditioning
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.conditioning)


def _price(objective: Objective, plan: ConditioningPlan) -> Work:
    blocks, n = objective.space.blocks, objective.num_params
    each = plan.spectrum.num_matvecs(n) + plan.spectrum.num_search(n)
    num_changed = plan.jacobi + plan.block_diagonal + plan.kfac
    products = float(each * (1 + num_changed)) + min(plan.diagonal_matvecs, n) * (plan.jacobi or plan.kfac)
    products += 16 * plan.kfac  # a gradient for each draw
    if plan.block_diagonal:
        products += max(block.num_params for block in blocks)
    if plan.layers:  # a product with a block costs about half of one with the whole
        sizes = [block.num_params for block in blocks]
        walks = 1 + num_changed * plan.kfac
        products += walks * sum(plan.spectrum.num_matvecs(m) + plan.spectrum.num_search(m) for m in sizes) / 2
    return Work(products=products)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: Conditioning) -> Report:
    matrix = "Hessian" if found.matrix == "hessian" else "Gauss-Newton matrix"
    exact = (
        "The matrix was small enough to be built in full."
        if found.whole.exact
        else (
            "Spectra are Gauss quadratures from block Lanczos; their errors join probes and quadrature. Condition "
            "numbers and numerical ranks stand between 95 % bounds; where the spectrum reaches down to the floor "
            "without a gap, a condition number is known from below only."
        )
    )
    return Report(
        title="Conditioning",
        facts=(matrix,),
        cards=_cards(found),
        findings=_findings(found, matrix),
        sections=(_conditions(found), _dimension(found)),
        terms=_TERMS,
        method=exact,
        notes=found.notes,
    )


def _cards(found: Conditioning) -> tuple[Card, ...]:
    whole = found.whole
    cards = [
        Card(
            label="Condition number",
            value=_kappa(whole.condition, found),
            hint="largest over smallest |eigenvalue| in the numerical range",
        ),
        _card("Effective rank", whole.effective_rank, found, "exp of the spectrum's entropy; n if all are equal"),
        _card("Stable rank", whole.stable_rank, found, "sum of squares over the largest square"),
        _card("Numerical rank", whole.rank, found, f"eigenvalues above {found.floor:g} of the largest"),
        Card(
            label="Largest stable step", value=wording.number(found.max_stable_lr), hint="2/λ, plain gradient descent"
        ),
    ]
    if found.layers:
        hint = "ratio of the largest to the smallest top eigenvalue of the layers, and of their best step sizes"
        cards.append(Card(label="Spread over layers", value=wording.number(found.layer_spread, 3), hint=hint))
    for name, gain in list(found.gains.items())[:2]:
        hint = "condition number without this preconditioner over that with it"
        cards.append(Card(label=f"Gain of {name}", value=f"{wording.TIMES} {wording.between(gain)}", hint=hint))
    return tuple(cards)


def _card(label: str, measured: Measured, found: Conditioning, hint: str) -> Card:
    """Return the card of a number, "exact" only if every eigenvalue was computed."""
    value, error = wording.value_and_error(measured)
    if found.whole.exact and measured.stderr == 0:
        error = "exact"
    elif error == "exact":
        error = ""
    return Card(label=label, value=value, error=error, hint=hint)


def _kappa(condition: Bounded, found: Conditioning, of: Callable[[float], float] = float) -> str:
    """Return a condition number or a function of it, as a bound where nothing but the floor bounds it from above."""
    low, high = condition.lower, condition.upper
    if high * found.floor > 0.999 and low < 0.9 * high:
        return f"at least {wording.about(of(low))}"
    return wording.between(Bounded.between(of(low), of(high)))


def _findings(found: Conditioning, matrix: str) -> tuple[Finding, ...]:
    whole = found.whole
    if whole.largest.value == 0:
        return (Finding("How ill-conditioned is it?", f"The {matrix} is zero: there is no curvature."),)
    text = (
        f"The largest curvature of the {matrix} is {_kappa(whole.condition, found)} times the smallest in the "
        f"numerical range. Its effective rank is {wording.number(whole.effective_rank.value, 3)} of "
        f"{wording.count(whole.num_params)}."
    )
    steps = _steps(whole, found)
    fewer = _kappa(whole.condition, found, lambda kappa: kappa**0.5 * math.log(1 / _ACCURACY) / 2)
    slow = (
        f"On a quadratic with these curvatures, {steps} steps of gradient descent to a hundredth of the distance, or "
        f"{fewer} with the best momentum, at a learning rate below {wording.number(found.max_stable_lr, 3)}."
    )
    answers = [Finding("How ill-conditioned is it?", text), Finding("What does that cost gradient descent?", slow)]
    if found.preconditioned:
        parts = [_gain(name, gain) for name, gain in found.gains.items()]
        answers.append(Finding("Would a preconditioner help?", f"{'; '.join(parts)}."))
    if found.layers:
        worst = max(found.layers, key=lambda layer: _finite(layer.condition.value))
        sharpest = max(found.layers, key=lambda layer: layer.largest.value)
        text = (
            f"{worst.name} is the worst conditioned by itself ({_kappa(worst.condition, found)}), {sharpest.name} the "
            f"sharpest ({wording.number(sharpest.largest.value, 3)}). The layers' top eigenvalues are a factor of "
            f"{wording.number(found.layer_spread, 3)} apart: their best step sizes differ by that factor."
        )
        answers.append(Finding("Which layers are ill-conditioned?", text))
    return tuple(answers)


def _gain(name: str, gain: Bounded) -> str:
    if not math.isfinite(gain.value):
        return f"{name}: not known"
    if gain.lower > 1.1:
        return f"{name} divides the condition number by {wording.between(gain)}"
    if gain.upper < 0.9:
        factor = wording.between(Bounded.between(1 / gain.upper, 1 / gain.lower))
        return f"{name} multiplies the condition number by {factor}"
    if gain.lower >= 0.9 and gain.upper <= 1.1:
        return f"{name} leaves the condition number about as it is"
    return f"{name} may or may not help: it divides the condition number by {wording.between(gain)}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _steps(condition: Condition, found: Conditioning) -> str:
    """Return the steps of gradient descent to a hundredth of the distance."""
    return _kappa(condition.condition, found, lambda kappa: kappa * math.log(1 / _ACCURACY))


def _conditions(found: Conditioning) -> Section:
    rows = (("loss", found.whole), *((c.name, c) for c in (*found.preconditioned, *found.layers)))
    num_rows = 1 + len(found.preconditioned) + len(found.layers)
    return Section(
        title="Condition numbers",
        figures=(
            Figure(
                name="conditions",
                label="Condition numbers of the whole, under preconditioners and of the layers; the table has the "
                "numbers.",
                caption="Condition numbers over the numerical range: of the loss (diamond), under each preconditioner "
                "(circles), of each layer's own block (squares).",
                draw=lambda ax, colors: plot_conditioning(found, ax=ax, colors=colors),
                height=1.3 + 0.28 * num_rows,
            ),
        ),
        tables=(
            Table(
                caption="The same in numbers. Steps are those of gradient descent to a hundredth of the distance.",
                columns=("matrix", "largest", "smallest", "condition", "effective rank", "stable rank", "steps"),
                rows=tuple(_cells(name, condition, found) for name, condition in rows),
            ),
            *_layers_under(found),
        ),
    )


def _layers_under(found: Conditioning) -> tuple[Table, ...]:
    """Return what each preconditioner makes of each layer's block."""
    if not found.layers_under:
        return ()
    columns = ("layer", "none", *found.layers_under)
    each = (found.layers, *found.layers_under.values())
    kappas = [[_kappa(c.condition, found) for c in conditions] for conditions in each]
    ranks = [[wording.quantity(c.effective_rank, 3) for c in conditions] for conditions in each]
    return tuple(
        Table(
            caption=f"{what} of each layer's block, without and under each preconditioner.",
            columns=columns,
            rows=tuple((c.name, *cells) for c, *cells in zip(found.layers, *table, strict=True)),
        )
        for what, table in (("Condition number", kappas), ("Effective rank", ranks))
    )


def _cells(name: str, c: Condition, found: Conditioning) -> tuple[str, ...]:
    return (
        name,
        wording.quantity(c.largest),
        wording.between(c.smallest),
        _kappa(c.condition, found),
        wording.quantity(c.effective_rank, 3),
        wording.quantity(c.stable_rank, 3),
        _steps(c, found),
    )


def _dimension(found: Conditioning) -> Section:
    return Section(
        title="How many directions the data determine",
        figures=(
            Figure(
                name="effective-dimension",
                label="Effective dimension against damping.",
                caption="Sum of λ/(λ + z) over the positive eigenvalues: directions that the data determine beyond a "
                "prior of precision z (MacKay 1992). The band is one standard error.",
                draw=lambda ax, colors: plot_effective_dimension(found, ax=ax, colors=colors),
            ),
        ),
    )


_TERMS = (
    (
        "Numerical range",
        "Eigenvalues nearer to zero than the floor are left out: they are rounding, or directions that do not matter. "
        "Without that every condition number would be infinite.",
    ),
    ("Effective rank", "exp of the entropy of |λ| / Σ|λ| (Roy and Vetterli 2007)."),
    ("Stable rank", "Σλ² / max λ²: squared Frobenius over squared spectral norm."),
    (
        "Gain",
        "Condition number without the preconditioner over that with it, of P^(−½) H P^(−½): above 1 it helps. Jacobi "
        "is the absolute diagonal, what AdaHessian aims at; K-FAC a Kronecker product for each layer.",
    ),
    ("± (uncertainty)", "One standard error over probes, joined with the error of the quadrature."),
)


STUDY = Study(record=ConditioningRun, plan=ConditioningPlan, measure=measure_conditioning, price=_price)
