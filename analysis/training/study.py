"""`curvature track`: how curvature moves along a training run, and whether its steps are stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from analysis.run.study import Study, StudyRun, Work
from analysis.show import wording
from analysis.show.report import Card, Figure, Finding, Report, Section, Table
from analysis.training.edge import edge_of_stability
from analysis.training.figures import plot_layer_sharpness, plot_predictions, plot_stability, plot_training
from analysis.training.further import further_sections, spikes_told
from analysis.training.measure import TrackPlan, track_training
from analysis.training.results import EdgeOfStability, Phase, TrainingReading, TrainingRecord
from analysis.training.spikes import loss_spikes
from curvature.objective.objective import Objective

__all__ = ["STUDY", "TrackRun"]

_ROWS = 12  # of the table


@dataclass(frozen=True, kw_only=True, repr=False)
class TrackRun(StudyRun):
    """One training run with its readings, and what produced it."""

    kind: ClassVar[str] = "track"
    result: ClassVar[str] = "training"

    training: TrainingRecord
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.training)


def _price(objective: Objective, plan: TrackPlan) -> Work:
    readings, wanted = -(-plan.steps // plan.spacing()), set(plan.quantities)
    products = 3 * len(wanted & {"sharpness", "preconditioned", "layers"}) + ("update" in wanted)
    products += 3 * bool(wanted & {"alignment", "oscillation"} and "sharpness" not in wanted)
    if "preconditioned" in wanted and "sharpness" in wanted and plan.optimizer == "sgd":
        products -= 3
    products += 8 * ("trace" in wanted) + 24 * ("spectrum" in wanted)
    losses = 5 * ("critical" in wanted) + ("update" in wanted)
    passes = 1 + ("oscillation" in wanted) + 3 * bool(wanted & {"noise", "penalties"})
    passes += 4 * ("smoothness" in wanted) + 5 * ("depth" in wanted)
    share = 1.0
    if plan.batch_size is not None:
        share = min(1.0, plan.batch_size / max(objective.total_weight, 1.0))
    gradients = plan.steps * share + passes * readings
    return Work(gradients=gradients, products=products * readings + 10, losses=losses * readings)


# -- what it tells ----------------------------------------------------------------------------------------------------


def _report(record: TrainingRecord) -> Report:
    edge = edge_of_stability(record)
    sections = [_stability(record, edge), _losses(record)]
    if any(not math.isnan(r.change) for r in record.readings):
        sections.append(_predictions(record))
    if any(r.layers for r in record.readings):
        sections.append(_layers(record))
    sections.extend(further_sections(record))
    return Report(
        title="Curvature along training",
        facts=(
            f"{record.optimizer}, {wording.count(record.num_steps)} steps",
            f"{wording.count(len(record.readings))} readings",
        ),
        cards=_cards(record, edge),
        findings=_findings(record, edge),
        sections=tuple(sections),
        terms=_TERMS,
        method=(
            "Readings were taken between steps on all data and left no trace in the training. Eigenvalues are followed "
            "from the eigenvector of the reading before, until the residual is 1 % of them (3 % after a single step) "
            "or 12 products are spent; each has its residual. All of it belongs to the parameters before its step."
        ),
        notes=record.notes,
    )


def _cards(record: TrainingRecord, edge: EdgeOfStability) -> tuple[Card, ...]:
    number = wording.number
    first, last = record.readings[0], record.readings[-1]
    phase = edge.phases[-1]
    cards = [
        Card(label="Loss", value=number(last.loss), hint=f"{number(first.loss)} at the start"),
        Card(label="State", value=phase.name.lower(), hint=phase.value),
    ]
    if not math.isnan(last.sharpness):
        residual, hint = f"± {number(last.sharpness_residual, 2)}", f"{number(first.sharpness)} at the start"
        cards.append(Card(label="Sharpness", value=number(last.sharpness), error=residual, hint=hint))
    if not math.isnan(last.preconditioned) and last.preconditioned != last.sharpness:
        residual, hint = f"± {number(last.preconditioned_residual, 2)}", "largest eigenvalue of P⁻¹H"
        cards.append(Card(label="Preconditioned", value=number(last.preconditioned), error=residual, hint=hint))
    cards.append(Card(label="Threshold", value=number(last.threshold), hint="where a step is no longer stable"))
    if edge.arrival is not None:
        spread = f"± {number(edge.std, 2)}"
        hint = f"mean of sharpness over threshold from step {wording.count(edge.arrival)} on"
        cards.append(Card(label="At the edge", value=number(edge.mean, 3), error=spread, hint=hint))
    if last.critical_status == "OK":
        hint = "2 over the rate at which the step would not lower the loss"
        cards.append(Card(label="Critical sharpness", value=number(last.critical_sharpness, 3), hint=hint))
    return tuple(cards)


def _findings(record: TrainingRecord, edge: EdgeOfStability) -> tuple[Finding, ...]:
    found = [Finding("Is the learning rate stable?", _stable(record, edge))]
    margin = [_margin(r) for r in record.readings if r.critical_status == "OK"]
    if margin:
        middle, least = sorted(margin)[len(margin) // 2], min(margin)
        text = (
            f"At the median reading a step {wording.number(middle, 2)} times as long would have left the loss as it "
            f"was; at the closest, {wording.number(least, 2)} times."
        )
        if least < 1:
            rises = 100 * sum(m < 1 for m in margin) / len(margin)
            text += f" {wording.number(rises, 2)}{wording.THIN}% of the steps read were longer than that."
        found.append(Finding("How long could steps be?", text))
    if spikes := loss_spikes(record):
        found.append(Finding("Were there loss spikes?", spikes_told(spikes)))
    pairs = [(r.change, r.linear_change, r.quadratic_change) for r in record.readings if r.change < 0]
    if pairs:
        linear, quadratic = (sorted(abs(p[i] / p[0] - 1) for p in pairs)[len(pairs) // 2] for i in (1, 2))
        text = (
            f"Where the loss falls, the fall that the gradient alone predicts is off by {_percent(linear)} at the "
            f"median, that of gradient and curvature together by {_percent(quadratic)}."
        )
        found.append(Finding("How well do gradient and curvature predict a step?", text))
    layers = record.readings[-1].layers
    if layers:
        top = max(layers, key=lambda name: layers[name])
        text = f"{top}, with {wording.number(layers[top], 3)} at the end; {_moved(record, top)}."
        found.append(Finding("Which layer is the sharpest?", text))
    return tuple(found)


def _stable(record: TrainingRecord, edge: EdgeOfStability) -> str:
    last, phase = record.readings[-1], edge.phases[-1]
    if phase is Phase.UNKNOWN:
        return "The threshold of this optimizer is not known, or the sharpness that it is one of was not measured."
    above = _percent(edge.share_above) if edge.share_above == edge.share_above else "no"
    if phase is Phase.UNSTABLE:
        how = "the loss is not finite" if not math.isfinite(last.loss) else f"{wording.number(last.stability, 3)} times"
        where = how if how.startswith("the loss") else f"sharpness is {how} its threshold at the end"
        return f"No: {where}. A smaller learning rate, or a warm-up, is needed."
    if edge.arrival is None:
        text = f"Yes: sharpness never reached its threshold; it ends at {wording.number(last.stability, 3)} of it."
        if phase is Phase.SHARPENING:
            text += " It still rises."
        return text
    text = (
        f"At its edge: sharpness reached the threshold at step {wording.count(edge.arrival)} and has been "
        f"{wording.number(edge.mean, 3)} times it on average since; {above} of all steps were above."
    )
    if edge.oscillation == edge.oscillation:
        text += (
            f" The gradient along the sharpest direction turns by a factor of {wording.number(edge.oscillation, 2)} in "
            "a step there."
        )
    catapults = sum(phase is Phase.CATAPULT for phase in edge.phases)
    belong = "reading belongs to a catapult" if catapults == 1 else "readings belong to catapults"
    return text + (f" {wording.count(catapults)} {belong}." if catapults else "")


def _margin(r: TrainingReading) -> float:
    return 2 / (r.critical_sharpness * r.lr)


def _percent(share: float) -> str:
    return f"{wording.number(100 * share, 2)}{wording.THIN}%"


def _moved(record: TrainingRecord, layer: str) -> str:
    first = record.readings[0].layers.get(layer, math.nan)
    return f"{wording.number(first, 3)} at the start"


def _stability(record: TrainingRecord, edge: EdgeOfStability) -> Section:
    number = wording.number
    readings = record.readings
    places = sorted({round(i * (len(readings) - 1) / (_ROWS - 1)) for i in range(_ROWS)})
    columns: dict[str, Callable[[TrainingReading], str]] = {
        "step": lambda r: wording.count(r.step),
        "age": lambda r: wording.count(r.interval),
        "loss": lambda r: number(r.loss),
        "sharpness": lambda r: number(r.sharpness),
        "residual": lambda r: number(r.sharpness_residual, 2),
    }
    if any(not math.isnan(r.preconditioned) for r in readings):
        columns["precond."] = lambda r: number(r.preconditioned)
    columns["over threshold"] = lambda r: number(r.stability, 3)
    tried = any(r.critical_status for r in readings)
    if tried:
        columns["critical"] = lambda r: (
            number(r.critical_sharpness, 3)
            if r.critical_status == "OK"
            else r.critical_status.lower().replace("_", " ")
        )
    rows = tuple((*(cell(readings[i]) for cell in columns.values()), edge.phases[i].name.lower()) for i in places)
    return Section(
        title="Stability",
        figures=(
            Figure(
                name="stability",
                label="Sharpness over the threshold of stability, and critical sharpness, along the steps.",
                caption="Sharpness as the optimizer sees it, over its threshold: above 1 a step is unstable on a "
                "quadratic." + " Dashed: critical sharpness times lr / 2; above 1 the step raises the loss." * tried,
                draw=lambda ax, colors: plot_stability(record, ax=ax, colors=colors),
            ),
        ),
        tables=(
            Table(
                caption="Some of the readings. Age: steps since the reading before.",
                columns=(*columns, "state"),
                rows=rows,
                num_prose=1,
            ),
        ),
    )


def _losses(record: TrainingRecord) -> Section:
    return Section(
        title="Loss",
        figures=(
            Figure(
                name="loss",
                label="The loss along the steps.",
                caption="The loss on all data, and that of the training's batch. With noise or penalties measured, "
                "these too.",
                draw=lambda ax, colors: plot_training(record, ax=ax, colors=colors),
            ),
        ),
    )


def _predictions(record: TrainingRecord) -> Section:
    return Section(
        title="What a step does",
        figures=(
            Figure(
                name="predictions",
                label="Change of the loss in single steps, beside linear and quadratic predictions.",
                caption="Change of the loss in the steps that were read, and what the gradient (dotted) and gradient "
                "and curvature (dashed) predict of it. Near zero the axis is linear.",
                draw=lambda ax, colors: plot_predictions(record, ax=ax, colors=colors),
            ),
        ),
    )


def _layers(record: TrainingRecord) -> Section:
    return Section(
        title="Layers",
        figures=(
            Figure(
                name="layer-sharpness",
                label="Sharpness of each layer along the steps, on a logarithmic axis.",
                caption="Largest eigenvalue of the diagonal block of each layer.",
                draw=lambda ax, colors: plot_layer_sharpness(record, ax=ax, colors=colors),
            ),
        ),
    )


_TERMS = (
    ("Sharpness", "Largest eigenvalue of the Hessian H of the loss."),
    ("Preconditioned", "Largest eigenvalue of P⁻¹H, P what the optimizer divides gradients by."),
    (
        "Threshold",
        "2 / lr for gradient descent, (2 + 2β) / lr with momentum β, (2 + 2β₁) / ((1 − β₁) lr) for Adam: beyond it "
        "steps grow on a quadratic. In full-batch training sharpness rises to it and stays: the edge of stability.",
    ),
    ("Critical sharpness", "2 / lr_c, lr_c the learning rate at which this very step leaves the loss where it was."),
    ("Catapult", "Sharpness above the threshold, the loss rises, and sharpness falls below."),
    ("± (uncertainty)", "For an eigenvalue, its residual: some eigenvalue lies within it. At the edge: the spread."),
)


STUDY = Study(record=TrackRun, plan=TrackPlan, measure=track_training, price=_price, unit="steps", resumable=True)
