"""`curvature dimension`: how many directions the data determine beside a regulariser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from analysis.generalization.dimension.figures import NAMES, plot_dimension_of
from analysis.generalization.dimension.measure import EffectiveDimensionPlan, effective_dimension
from analysis.generalization.dimension.results import EffectiveDimension, MatrixDimension
from analysis.records.measured import Measured
from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "EffectiveDimensionRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class EffectiveDimensionRun(StudyRun):
    """Effective dimensions, and what produced them."""

    kind: ClassVar[str] = "dimension"
    result: ClassVar[str] = "dimension"

    dimension: EffectiveDimension
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.dimension)


def _price(objective: Objective, plan: EffectiveDimensionPlan) -> Work:
    matrices = 1 + objective.has_split * (1 + plan.kernel)
    return Work(products=matrices * plan.spectrum.num_matvecs(objective.num_params))


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: EffectiveDimension) -> Report:
    return Report(
        title="Effective dimension",
        facts=(f"{found.loss}, training loss {wording.number(found.train_loss, 3)}",),
        cards=_cards(found),
        findings=_findings(found),
        sections=(_curves(found), _table(found)),
        terms=_TERMS,
        method=(
            "One block Krylov space for each matrix; d is the sum over its eigenvalues above 0, by quadrature. "
            "Shaded: "
            "95 % over probes, and for the Gauss-Newton matrix and the kernel the bounds of the rules of Gauss and "
            "Gauss-Radau; for the Hessian the error of the rule is judged by fewer steps. Regularisers stand "
            "beside the loss summed over its terms."
        ),
        notes=found.notes,
    )


def _nearest(found: EffectiveDimension, matrix: MatrixDimension, alpha: float) -> Measured:
    i = int((found.regularisers.log() - math.log(alpha)).abs().argmin())
    return Measured(
        value=float(matrix.values[i]), stderr=float(matrix.stderr[i]), data_stderr=float(matrix.data_stderr[i])
    )


def _cards(found: EffectiveDimension) -> tuple[Card, ...]:
    alpha = _unit(found)
    hint = f"at α ≈ {wording.number(alpha, 2)}"
    return tuple(Card.of(NAMES[m.matrix], _nearest(found, m, alpha), hint) for m in found.matrices)


def _unit(found: EffectiveDimension) -> float:
    """Return the regulariser of the grid that is nearest to 1."""
    return float(found.regularisers[int(found.regularisers.log().abs().argmin())])


def _findings(found: EffectiveDimension) -> tuple[Finding, ...]:
    number, alpha = wording.number, _unit(found)
    main = found.matrices[0]
    here = _nearest(found, main, alpha)
    share = here.value / found.num_params
    low, high = float(found.regularisers[0]), float(found.regularisers[-1])
    told = [
        Finding(
            "How many directions do the data determine?",
            f"About {wording.about(here.value)} of {wording.count(found.num_params)} ({number(100 * share, 2)}"
            f"{wording.THIN}%) beside a regulariser of {number(alpha, 2)}, by the {NAMES[main.matrix]} matrix; "
            f"{wording.about(float(main.values[0]))} beside {number(low, 2)} and "
            f"{wording.about(float(main.values[-1]))} beside {number(high, 2)}. The number belongs to its regulariser.",
        )
    ]
    names = {m.matrix for m in found.matrices}
    if {"ggn", "hessian"} <= names:
        told.append(Finding("Does it matter which matrix?", _which(found, alpha)))
    if {"ggn", "kernel"} <= names and found.loss == "cross-entropy":
        told.append(Finding("How much of it is confidence?", _confidence(found, alpha)))
    told.append(Finding("Does it say how well the model generalises?", _generalises(found)))
    return tuple(told)


def _which(found: EffectiveDimension, alpha: float) -> str:
    ggn, hessian = (_nearest(found, found.of(name), alpha) for name in ("ggn", "hessian"))
    off = abs(ggn.value - hessian.value)
    error = math.hypot(ggn.stderr, hessian.stderr)
    texts = [f"Gauss-Newton {wording.quantity(ggn, 3)}, Hessian {wording.quantity(hessian, 3)} at the same regulariser"]
    if off <= 2 * error:
        return f"{texts[0]}: the same within their errors."
    return f"{texts[0]}: they differ by {wording.number(100 * off / max(ggn.value, 1e-300), 2)}{wording.THIN}%."


def _confidence(found: EffectiveDimension, alpha: float) -> str:
    ggn, kernel = (_nearest(found, found.of(name), alpha).value for name in ("ggn", "kernel"))
    return (
        f"Beside the same regulariser the kernel of the outputs, in which the loss has no part, has "
        f"{wording.about(kernel)}; with the loss there are {wording.about(ggn)}. The curvature of cross-entropy "
        "carries p (1 − p) of each output, which goes to 0 as answers become certain: the difference is that."
    )


def _generalises(found: EffectiveDimension) -> str:
    known = {
        "cross-entropy": "Among networks that fit their labels it fell with the test loss as width grew (digits, 20 % "
        "label noise), and went on falling where the test loss rose again: it falls with confidence alone, too. "
        "Compare networks of a like training loss.",
        "squared error": "Under squared error it rose with width while the test loss fell (digits, 20 % label noise): "
        "it does not track it.",
    }
    text = known.get(found.loss, "For this loss nothing was measured.")
    return f"Not by itself. {text}"


def _curves(found: EffectiveDimension) -> Section:
    return Section(
        title="Along the regulariser",
        figures=(
            Figure(
                name="effective-dimension",
                label="Effective dimension of each matrix against the regulariser, both logarithmic.",
                caption="Shaded: what probes and quadrature leave open. Dotted: the number of parameters.",
                draw=lambda ax, colors: plot_dimension_of(found, ax=ax, colors=colors),
                height=3.4,
            ),
        ),
    )


def _table(found: EffectiveDimension) -> Section:
    number = wording.number
    rows = tuple(
        (
            number(float(alpha), 3),
            *(
                cell
                for m in found.matrices
                for cell in (
                    wording.quantity(Measured(value=float(m.values[i]), stderr=float(m.stderr[i])), 4),
                    f"{number(float(m.lower[i]), 4)} to {number(float(m.upper[i]), 4)}",
                )
            ),
        )
        for i, alpha in enumerate(found.regularisers)
    )
    columns = tuple(text for m in found.matrices for text in (NAMES[m.matrix], "95 %"))
    caption = "With one standard error, and between which bounds. Products: " + ", ".join(
        f"{NAMES[m.matrix]} {wording.count(m.num_matvecs)}{' (exact)' if m.exact else ''}" for m in found.matrices
    )
    table = Table(caption=f"{caption}.", columns=("regulariser", *columns), rows=rows, on_screen=False)
    return Section(title="All numbers", tables=(table,))


_TERMS = (
    (
        "Effective dimension",
        "Σ λ / (λ + α), eigenvalues λ above 0: directions determined beside a regulariser.",
    ),
    ("Regulariser α", "The precision of a normal prior, beside the loss summed over its terms."),
    ("Kernel J J'", "Inner products of the outputs' gradients; its eigenvalues are those of J'J, without the loss."),
)


STUDY = Study(
    record=EffectiveDimensionRun,
    plan=EffectiveDimensionPlan,
    measure=effective_dimension,
    price=_price,
    groups=True,
    unit="matrices",
)
