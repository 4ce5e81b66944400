"""`curvature regularize`: what weight decay, dropout, augmentation and others do to curvature, with paired seeds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from analysis.generalization.contrast.layers import has_batch_norm, with_batch_norm, with_dropout
from analysis.generalization.contrast.measure import REGULARIZERS, compared, prepared
from analysis.generalization.contrast.price import price_of
from analysis.generalization.contrast.report import TERMS, facts, points, sections, told_ratio
from analysis.generalization.contrast.results import Contrasts
from analysis.generalization.data import LossName
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.draft import Draft
from analysis.run.study import Price, Study, StudyRun
from analysis.show import wording
from analysis.show.listener import Progress
from analysis.show.report import Card, Finding, Report
from curvature.arguments import checked_fields
from curvature.errors import InputError
from curvature.losses.rules import CrossEntropy
from curvature.objective.objective import Objective

__all__ = ["STUDY", "RegularizationPlan", "RegularizationRun", "regularization_by_curvature"]


@checked_fields
@dataclass(frozen=True, kw_only=True)
class RegularizationPlan(Plan):
    """How networks are trained, and how strong each regulariser is."""

    samples: int | None = setting(None, "Training examples. Default: 300, or all.", least=10)
    width: int | None = setting(
        None,
        "Units of the first hidden layer. Default: so many that there are 20 parameters for each example.",
        least=1,
    )
    label_noise: float = setting(0.0, "Probability that a training label is another class.", least=0, below=1)
    weight_decay: float = setting(0.005, "Weight decay (of adam, decoupled: take more).", least=0)
    dropout: float = setting(0.2, "Share of units dropped after each activation.", above=0, below=1)
    rho: float = setting(0.05, "Radius of sharpness-aware minimisation (SAM).", above=0)
    smoothing: float = setting(0.1, "Label smoothing.", above=0, below=1)
    repeats: int = setting(5, "Seeds, the same for all regularisers.", least=2)
    steps: int = setting(1500, "Steps of each training.", least=10)
    optimizer: Literal["adam", "sgd"] = setting("sgd", "Optimizer; sgd has a momentum of 0.9.")
    lr: float = setting(0.05, "Learning rate; it falls to a hundredth along a cosine.", above=0)
    batch_size: int | None = setting(64, "Examples of a batch.", least=1)
    loss: LossName = setting("task", "The task's loss, cross-entropy, or half the squared distance to one-hot labels.")
    regulariser: float = setting(1.0, "alpha of the effective dimension.", above=0)
    processes: int | None = setting(None, "Processes that train. Default: one for each core.", least=1)
    target: ClassVar[float] = 0.0
    roomy: ClassVar[bool] = True

    @property
    def squared(self) -> bool:
        """Whether labels are smoothed in the squared error."""
        return self.loss == "squared"


@from_plan(RegularizationPlan)
def regularization_by_curvature(
    objective: Objective,
    plan: RegularizationPlan,
    *,
    generator: torch.Generator,
    test_data: Any = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> Contrasts:
    """Train with no regulariser and with each of six, and measure what each does to curvature and gradient noise.

    Weight decay, dropout after each activation, augmentation (images shifted by up to a pixel each way; of other inputs
    a tenth of their spread as noise), batch normalisation after each hidden layer, SAM, label smoothing. All are
    measured after the same steps, in eval mode, on the same training data by the same plain loss, without a
    regulariser's own part; seeds, batches and labels are the same within a repeat. Training losses differ, and under
    cross-entropy curvature falls with them: they stand beside.

    Cost: seven trainings of `repeats` networks side by side, SAM's at twice the price.

    Args:
        objective: of a classifier; its parameters are drawn anew.
        plan: settings; or pass them one by one.
        generator: source of random numbers, or a seed.
        test_data: inputs and labels; without any a fifth of the data is held out.
        progress: told after each regulariser.
        draft: where results are kept, from which an interrupted run goes on.

    Raises:
        InputError: for settings out of range, or other data than class labels.
    """
    shared, notes = prepared(objective, plan, generator, test_data)
    names = list(REGULARIZERS)
    if has_batch_norm(shared.model):
        names.remove("batch norm")
        notes.append("The model normalises over batches already; batch norm is no condition of its own.")
    for name, change in (("dropout", partial(with_dropout, p=plan.dropout)), ("batch norm", with_batch_norm)):
        try:
            if name in names:
                change(copy.deepcopy(shared.model))
        except InputError as error:
            names.remove(name)
            notes.append(f"There is no condition {name}: {error}")
    rule = objective.rule if plan.loss == "task" else None
    known = plan.loss != "task" or isinstance(rule, CrossEntropy)
    if not known:
        names.remove("label smoothing")
        notes.append("Labels are smoothed for cross-entropy and squared error only; --loss chooses one.")
    elif rule is not None and rule.settings.get("label_smoothing", 0.0) > 0:
        names.remove("label smoothing")
        notes.append("The task's loss smooths labels already, in all conditions; --loss cross-entropy leaves that out.")
    loss = "squared error" if plan.squared else plan.loss.replace("task", "the task's loss")
    return compared(shared, names, "regularization", loss, notes, progress, draft)


@dataclass(frozen=True, kw_only=True, repr=False)
class RegularizationRun(StudyRun):
    """Trainings under regularisers, and what produced them."""

    kind: ClassVar[str] = "regularize"
    result: ClassVar[str] = "regularization"

    regularization: Contrasts
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.regularization)


def _report(found: Contrasts) -> Report:
    return Report(
        title="Regularisation seen by curvature",
        facts=facts(found),
        cards=_cards(found),
        findings=_findings(found),
        sections=sections(
            found,
            (
                ("train_loss", "train loss"),
                ("sharpness", "sharpness"),
                ("trace", "trace"),
                ("effective_dimension", "eff. dimension"),
                ("noise_trace", "gradient noise"),
                ("norm", "norm"),
            ),
        ),
        terms=TERMS,
        method=(
            "All are measured after the same steps, in eval mode, by the plain loss on the same training data. Ratios "
            "and differences are taken within repeats, which share seeds, batches and labels. With so many comparisons "
            "some intervals miss 1 by chance: about one in twenty."
        ),
        notes=found.notes,
    )


def _cards(found: Contrasts) -> tuple[Card, ...]:
    others = found.conditions[1:]
    best = min(found.conditions, key=lambda c: found.mean("test_error", c).value)
    cards = [Card.of("Lowest test error", found.mean("test_error", best), best, percent=True)]
    ratios = {c: found.ratio("sharpness", c) for c in others}
    known = {c: r for c, r in ratios.items() if math.isfinite(r.value)}
    if known:
        flattest = min(known, key=lambda c: known[c].value)
        cards.append(
            Card(
                label="Flattest",
                value=flattest,
                error=f"{wording.number(known[flattest].value, 2)} times",
                hint="sharpness over that without a regulariser",
            )
        )
    return tuple(cards)


def _findings(found: Contrasts) -> tuple[Finding, ...]:
    told = []
    for name, question in (
        ("sharpness", "Which of them flatten the minimum?"),
        ("noise_trace", "Which of them lower the gradient noise?"),
        ("effective_dimension", "Which of them change the effective dimension?"),
    ):
        told.append(Finding(question, _sorted(found, name)))
    helped = []
    for condition in found.conditions[1:]:
        off = found.difference("test_error", condition)
        low, high = off.interval()
        verdict = "lowers it" if high < 0 else "raises it" if low > 0 else "no difference beyond chance"
        helped.append(f"{condition}: {points(off)} points, {verdict}")
    told.append(Finding("Do they help on test data?", f"{'; '.join(helped)} (95 %)."))
    flat = sorted(found.conditions, key=lambda c: found.mean("sharpness", c).value)
    best = min(found.conditions, key=lambda c: found.mean("test_error", c).value)
    place = flat.index(best) + 1
    told.append(
        Finding(
            "Is the flattest the best?",
            f"{'Yes' if place == 1 else 'No'}: the lowest test error is that of {best}, number {place} of "
            f"{wording.count(len(flat))} from the flattest ({flat[0]}). Training losses differ, and under "
            "cross-entropy sharpness falls with the loss alone.",
        )
    )
    return tuple(told)


def _sorted(found: Contrasts, name: str) -> str:
    less: list[str] = []
    more: list[str] = []
    same: list[str] = []
    for condition in found.conditions[1:]:
        ratio = found.ratio(name, condition)
        text = f"{condition} {told_ratio(ratio)}"
        if not math.isfinite(ratio.value):
            continue
        (less if ratio.upper < 1 else more if ratio.lower > 1 else same).append(text)
    parts = [f"{word}: {', '.join(texts)}" for word, texts in (("Lower", less), ("Higher", more)) if texts]
    if same:
        parts.append(f"{'n' if parts else 'N'}o change beyond chance: {', '.join(same)}")
    return f"{'; '.join(parts)} (over none, 95 %)."


def _price(objective: Objective, plan: RegularizationPlan, test_data: Any = None) -> Price:
    return price_of(objective, plan, len(REGULARIZERS), test_data)


STUDY = Study(
    record=RegularizationRun,
    plan=RegularizationPlan,
    measure=regularization_by_curvature,
    price=_price,
    unit="trainings",
    resumable=True,
    held_out=True,
)
