"""`curvature critical`: is this point a minimum, a saddle, a plateau, or none of them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from analysis.critical.figures import plot_escape
from analysis.critical.measure import CriticalPlan, critical_points
from analysis.critical.results import CriticalPoint
from analysis.records.measured import Bounded
from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from curvature.objective.objective import Objective

__all__ = ["STUDY", "CriticalRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class CriticalRun(StudyRun):
    """One judgement of a point, with what produced it."""

    kind: ClassVar[str] = "critical"
    result: ClassVar[str] = "critical"

    critical: CriticalPoint
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.critical, self.num_params)


def _price(objective: Objective, plan: CriticalPlan) -> Work:
    n, spectrum = objective.num_params, plan.spectrum(objective)
    trials = 2 * len(objective.space.blocks) - 1 if plan.symmetries else 0
    return Work(
        products=spectrum.num_matvecs(n) + spectrum.num_search(n) + trials,
        gradients=3.0,
        losses=plan.num_points + 3 * trials,
    )


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(found: CriticalPoint, num_params: int) -> Report:
    sections = [_escape(found)]
    if found.symmetries:
        sections.append(_symmetries(found))
    return Report(
        title="Critical point",
        facts=(f"{wording.count(found.num_matvecs)} Hessian products",),
        cards=_cards(found),
        findings=_findings(found, num_params),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            "The Hessian was built in full: both counts are certain."
            if found.exact
            else "Extreme eigenpairs and the density come from one block Krylov space. Counts are read from the "
            "density; the lower bound on the index counts orthonormal directions with negative Ritz values "
            "(Courant-Fischer)."
        ),
        notes=found.notes,
    )


def _cards(found: CriticalPoint) -> tuple[Card, ...]:
    noise = "" if found.gradient_noise is None else f"noise {wording.number(found.gradient_noise, 3)}"
    if found.noise_dimension is not None:
        noise += f" in about {wording.about(found.noise_dimension)} directions"
    p = "" if found.p_value is None else f"p {_p(found.p_value)} for a zero gradient"
    zero = f"what lies within ±{wording.number(found.tolerance, 2)}"
    return (
        Card(label="Verdict", value=found.kind, hint=found.why),
        Card(label="Gradient norm", value=wording.number(found.gradient_norm, 3), error=noise, hint=p),
        Card.of("Smallest eigenvalue", found.lowest, f"{zero} counts as zero"),
        Card.of("Largest eigenvalue", found.largest, "of the Hessian"),
        _count("Index", found.index, found, f"negative eigenvalues; at least {found.index_at_least} for certain"),
        _count("Nullity", found.nullity, found, "eigenvalues that count as zero"),
        Card(
            label="Drop",
            value=wording.number(found.escape.drop, 3),
            hint="largest fall of the loss along the line below",
        ),
        Card(label="Loss", value=wording.number(found.loss)),
    )


def _p(value: float) -> str:
    return "< 10⁻⁶" if value < 1e-6 else wording.number(value, 2)


def _count(label: str, measured: Bounded, found: CriticalPoint, hint: str) -> Card:
    """Return a number of eigenvalues; that its bounds agree does not make it exact."""
    exact = "exact" if found.exact and measured.stderr == 0 else ""
    return Card(label=label, value=wording.between(measured), error=exact, hint=hint)


_VERDICTS = {
    "not critical": "Not a critical point: the gradient is not zero",
    "minimum": "A minimum, as far as was measured",
    "minimum to second order": "A minimum to second order only",
    "saddle": "A saddle",
    "maximum": "A maximum",
    "maximum to second order": "A maximum to second order only",
    "plateau": "A plateau",
    "undecided": "Undecided",
}


def _findings(found: CriticalPoint, num_params: int) -> tuple[Finding, ...]:
    answers = [Finding("Is this a minimum?", f"{_VERDICTS[found.kind]}: {found.why}.")]
    if found.gradient_noise is not None and found.p_value is not None:
        ratio = found.gradient_norm / found.gradient_noise if found.gradient_noise > 0 else float("inf")
        text = (
            f"Its norm is {wording.number(ratio, 2)} times what sampling noise alone would give (p "
            f"{_p(found.p_value)} for a zero gradient)."
        )
        answers.append(Finding("Is the gradient zero within its noise?", text))
    answers.append(Finding("Does the loss fall in some direction?", _way_down(found)))
    flat = f"{wording.between(found.nullity)} of {wording.count(num_params)} eigenvalues count as zero."
    held = [s.name for s in found.symmetries if s.holds]
    if held:
        flat += f" Some are flat for any data: {'; '.join(held)}."
    answers.append(Finding("How flat is it?", flat))
    return tuple(answers)


def _way_down(found: CriticalPoint) -> str:
    line = found.escape
    curvature, reach = wording.number(line.curvature, 3), wording.number(float(line.steps.abs().max()), 2)
    along, drop = f"along the direction of least curvature ({curvature})", wording.number(line.drop, 3)
    if line.drop == 0 and line.curvature < -found.tolerance:
        return f"The curvature is negative {along}, but no step tried, of up to {reach}, lowers the loss."
    if line.drop == 0:
        return f"The loss rises {along}, both ways."
    text = f"The loss falls by up to {drop} {along}, within steps of {reach}"
    if found.kind == "minimum":
        text += ": the gradient is not exactly zero, or the fall lies beyond a barrier"
        return f"{text}. The curvature at the point itself is positive."
    if found.kind == "minimum to second order":
        return f"{text}: near the point, slope and tolerance account for the fall."
    return f"{text}."


def _escape(found: CriticalPoint) -> Section:
    return Section(
        title="Along the direction of least curvature",
        figures=(
            Figure(
                name="escape",
                label="The loss along the direction of least curvature, and its quadratic model.",
                caption="The loss along the eigenvector of the smallest eigenvalue (dots) and its quadratic model "
                "from slope and curvature at the point (dashed). Positive steps go against the gradient.",
                draw=lambda ax, colors: plot_escape(found, ax=ax, colors=colors),
            ),
        ),
    )


def _symmetries(found: CriticalPoint) -> Section:
    rows = tuple(
        (
            s.name,
            wording.number(s.loss_change, 2),
            wording.number(s.gradient_residual, 2),
            wording.number(s.hessian_residual, 2),
            "yes" if s.holds else "no",
        )
        for s in found.symmetries
    )
    table = Table(
        caption="Rescalings of layers that were tested: relative change of the loss, and relative residuals of the "
        "identities that gradient and Hessian satisfy where the loss is invariant.",
        columns=("scales", "loss", "gradient", "Hessian", "symmetry"),
        rows=rows,
    )
    return Section(title="Symmetries: directions that are flat for any data", tables=(table,))


_TERMS = (
    (
        "Verdict",
        "Critical is a point whose gradient is no larger than its noise explains. A saddle has eigenvalues that are "
        "certainly negative and positive ones; at a plateau all lie within the tolerance; at a minimum none was "
        "found below it. To second order only: some eigenvalues count as zero, and terms of higher order decide "
        "along their directions.",
    ),
    ("Index", "Number of eigenvalues below minus the tolerance."),
    ("Nullity", "Number of eigenvalues within the tolerance of zero."),
    ("Noise", "The gradient norm expected on this many examples if the true gradient were zero."),
    ("± (uncertainty)", "For an eigenvalue, its residual. Counts are given as 95 % bounds over probes and quadrature."),
)


STUDY = Study(record=CriticalRun, plan=CriticalPlan, measure=critical_points, price=_price)
