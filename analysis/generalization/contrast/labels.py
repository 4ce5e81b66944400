"""`curvature labels`: true labels, shuffled and random ones, and pixels without order, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from analysis.generalization.contrast.measure import LABELS, compared, prepared
from analysis.generalization.contrast.price import price_of
from analysis.generalization.contrast.report import TERMS, facts, sections, told_ratio
from analysis.generalization.contrast.results import Contrasts
from analysis.generalization.data import LossName
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.draft import Draft
from analysis.run.study import Price, Study, StudyRun
from analysis.show import wording
from analysis.show.listener import Progress
from analysis.show.report import Card, Finding, Report
from curvature.arguments import checked_fields
from curvature.objective.objective import Objective

__all__ = ["STUDY", "RandomLabelsPlan", "RandomLabelsRun", "random_labels"]


@checked_fields
@dataclass(frozen=True, kw_only=True)
class RandomLabelsPlan(Plan):
    """How networks are trained, and where they are measured."""

    samples: int | None = setting(None, "Training examples. Default: 300, or all.", least=10)
    width: int | None = setting(
        None,
        "Units of the first hidden layer. Default: so many that there are 20 parameters for each example.",
        least=1,
    )
    target: float = setting(0.05, "Training loss at which each network is measured.", above=0)
    repeats: int = setting(5, "Seeds: of parameters and labels.", least=2)
    steps: int = setting(3000, "Steps at most.", least=10)
    optimizer: Literal["adam", "sgd"] = setting("adam", "Optimizer; sgd has a momentum of 0.9.")
    lr: float = setting(0.003, "Learning rate, the same for all.", above=0)
    batch_size: int | None = setting(None, "Examples of a batch. Default: all.", least=1)
    loss: LossName = setting("task", "The task's loss, cross-entropy, or half the squared distance to one-hot labels.")
    regulariser: float = setting(1.0, "alpha of the effective dimension.", above=0)
    processes: int | None = setting(None, "Processes that train. Default: one for each core.", least=1)
    label_noise: ClassVar[float] = 0.0
    roomy: ClassVar[bool] = True


@from_plan(RandomLabelsPlan)
def random_labels(
    objective: Objective,
    plan: RandomLabelsPlan,
    *,
    generator: torch.Generator,
    test_data: Any = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> Contrasts:
    """Fit true labels, labels shuffled among the examples, random ones, and pixels in another order, side by side.

    A network that fits labels which carry nothing shows that its size alone bounds no test error (Zhang et al. 2017).
    Each network is measured where its training loss first comes to `target`, so that sharpness and noise are compared
    at one loss: how long that takes, norms, curvature, gradient noise. Parameters have the same seeds under all
    conditions; "shuffled pixels" permutes the pixels of all images alike, of test images too, "random pixels" those of
    each image on its own; both are the same in all repeats.

    Cost: five trainings of `repeats` networks side by side, and the curvature of each network once.

    Args:
        objective: of a classifier; its parameters are drawn anew.
        plan: settings; or pass them one by one.
        generator: source of random numbers, or a seed.
        test_data: inputs and labels; without any a fifth of the data is held out.
        progress: told after each condition.
        draft: where conditions are kept, from which an interrupted run goes on.

    Raises:
        InputError: for settings out of range, or other data than class labels.

    Reference: Zhang, Bengio, Hardt, Recht and Vinyals (2017), Understanding deep learning requires rethinking
    generalization.
    """
    shared, notes = prepared(objective, plan, generator, test_data)
    loss = "squared error" if plan.loss == "squared" else plan.loss.replace("task", "the task's loss")
    return compared(shared, LABELS, "labels", loss, notes, progress, draft)


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomLabelsRun(StudyRun):
    """Trainings on labels that carry more or less, and what produced them."""

    kind: ClassVar[str] = "labels"
    result: ClassVar[str] = "labels"

    labels: Contrasts
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        return _report(self.labels)


def _report(found: Contrasts) -> Report:
    return Report(
        title="Random labels",
        facts=facts(found),
        cards=_cards(found),
        findings=_findings(found),
        sections=sections(
            found,
            (
                ("steps", "steps to the target"),
                ("norm", "norm"),
                ("distance", "distance"),
                ("sharpness", "sharpness"),
                ("trace", "trace"),
                ("noise_trace", "gradient noise"),
            ),
        ),
        terms=TERMS,
        method=(
            f"Each network is measured where its training loss is first seen at {found.target:g} or below, checked 200 "
            "times along its steps. Test labels are the true ones; test pixels are permuted like those of training. "
            "Ratios are taken within repeats, whose parameters have the same seeds."
        ),
        notes=found.notes,
    )


def _cards(found: Contrasts) -> tuple[Card, ...]:
    cards = []
    for condition in ("true labels", "random labels"):
        steps = [row.fit_steps for row in found.rows if row.condition == condition]
        fitted = [s for s in steps if math.isfinite(s)]
        value = wording.count(sum(fitted) / len(fitted)) if len(fitted) == len(steps) else "not fitted"
        cards.append(Card(label=f"Steps to fit {condition}", value=value, hint="training error 0, mean over repeats"))
    ratio = found.ratio("sharpness", "random labels")
    cards.append(
        Card(
            label="Sharpness, random over true",
            value=wording.number(ratio.value, 2) if math.isfinite(ratio.value) else "unknown",
            hint="at the same training loss" if math.isfinite(ratio.value) else "not measured at one training loss",
        )
    )
    error = found.mean("test_error", "true labels")
    cards.append(Card.of("Test error, true labels", error, "clean labels", percent=True))
    return tuple(cards)


def _findings(found: Contrasts) -> tuple[Finding, ...]:
    number = wording.number
    fitted = {c: [math.isfinite(r.fit_steps) for r in found.rows if r.condition == c] for c in found.conditions}
    whole = [c for c in found.conditions if all(fitted[c])]
    missing = [c for c in found.conditions if not all(fitted[c])]
    said = f"It fits {', '.join(whole)} without error." if whole else "It fits none of them in all repeats."
    if missing:
        said += f" Not in all repeats: {', '.join(missing)}; more steps or a wider network may."
    chance = 100 * (1 - 1 / found.num_classes)
    random = 100 * found.mean("test_error", "random labels").value
    said += (
        f" After random labels the test error is {number(random, 3)}{wording.THIN}% (guessing: {number(chance, 3)}"
        f"{wording.THIN}%), after true ones {number(100 * found.mean('test_error', 'true labels').value, 3)}"
        f"{wording.THIN}%: with the same size and training. What bounds the test error must see more than these."
    )
    return (
        Finding("Can it fit labels that mean nothing?", said),
        Finding("Is that harder?", _slower(found)),
        Finding("Does curvature tell them apart?", _seen(found)),
    )


def _slower(found: Contrasts) -> str:
    short = [c for c in found.conditions if not found.reached(c)]
    told = []
    if found.conditions[0] not in short:
        of = {"for random ones": "random labels", "for random pixels": "random pixels"}
        told = [f"{told_ratio(found.ratio('steps', c))} times {words}" for words, c in of.items() if c not in short]
    text = ""
    if told:
        text = (
            f"Steps until the training loss comes to {found.target:g}, over those with true labels: {', '.join(told)} "
            "(95 %)."
        )
    if short:
        text += (
            f" Within {wording.count(found.steps)} steps not all repeats came to a training loss of {found.target:g} "
            f"({', '.join(short)}): these were measured after the last step, so that ratios with them are left out. "
            "More steps, a higher rate or a higher target may."
        )
    return text.strip()


def _seen(found: Contrasts) -> str:
    random = "random labels"
    short = [c for c in (found.conditions[0], random) if not found.reached(c)]
    if short:
        return (
            f"Not known: with {' and '.join(short)} not all repeats came to a training loss of {found.target:g}, and "
            "curvature is compared at one training loss only."
        )
    names = {"norm": "norm", "distance": "distance from the start", "sharpness": "sharpness", "trace": "trace"}
    ratios = ", ".join(
        f"{words} {told_ratio(found.ratio(name, random))}"
        for name, words in (names | {"noise_trace": "gradient noise"}).items()
    )
    return f"At the same training loss, random over true labels: {ratios}."


def _price(objective: Objective, plan: RandomLabelsPlan, test_data: Any = None) -> Price:
    return price_of(objective, plan, len(LABELS), test_data)


STUDY = Study(
    record=RandomLabelsRun,
    plan=RandomLabelsPlan,
    measure=random_labels,
    price=_price,
    unit="trainings",
    resumable=True,
    held_out=True,
)
