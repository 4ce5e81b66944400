"""Effective model complexity by bisection: what `curvature complexity` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from analysis.generalization.complexity.results import EffectiveModelComplexity
from analysis.generalization.data import LossName
from analysis.generalization.descent.measure import DescentPlan, setup, trained
from analysis.generalization.descent.results import DescentRow
from analysis.generalization.kept import Kept
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.draft import Draft
from analysis.show.listener import Progress
from curvature.arguments import checked_fields
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["ComplexityPlan", "effective_model_complexity"]

_LEAST = 10  # examples of the smallest training


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ComplexityPlan(Plan):
    """Which training procedure, and how closely its complexity is searched."""

    epsilon: float = setting(0.05, "Training error that counts as fitted.", least=0, below=1)
    samples: int | None = setting(None, "Examples of the training whose regime is named. Default: all.", least=2)
    resolution: float = setting(1.1, "Factor between neighbours where the search ends.", above=1, most=2)
    confidence: float = setting(0.95, "Of the interval over seeds.", above=0, below=1)
    label_noise: float = setting(0.2, "Probability that a training label is another class.", least=0, below=1)
    width: int | None = setting(None, "Units of the first hidden layer. Default: those of the task's model.", least=1)
    repeats: int = setting(5, "Seeds: of parameters, label noise and order.", least=3)
    steps: int = setting(2000, "Steps of the optimizer, whatever the number of examples.", least=1)
    optimizer: Literal["adam", "sgd"] = setting("adam", "Optimizer; sgd has a momentum of 0.9.")
    lr: float = setting(0.01, "Learning rate; it falls to a hundredth along a cosine.", above=0)
    weight_decay: float = setting(0.0, "Weight decay, decoupled for adam.", least=0)
    batch_size: int | None = setting(None, "Examples of a batch. Default: all.", least=1)
    loss: LossName = setting("task", "The task's loss, cross-entropy, or half the squared distance to one-hot labels.")
    processes: int | None = setting(None, "Processes that train. Default: one for each core.", least=1)

    @property
    def training(self) -> DescentPlan:
        """The same as trainings along the number of examples."""
        names = ("label_noise", "width", "repeats", "steps", "optimizer", "lr", "weight_decay", "batch_size", "loss")
        own = {name: getattr(self, name) for name in (*names, "processes")}
        return DescentPlan(vary="samples", curvature=False, **own)


@from_plan(ComplexityPlan)
def effective_model_complexity(
    objective: Objective,
    plan: ComplexityPlan,
    *,
    generator: torch.Generator,
    test_data: Any = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> EffectiveModelComplexity:
    """Search the largest number of examples that a training procedure fits: max n with mean training error <= epsilon.

    The procedure is all of it: model, optimizer, steps, noise of the labels. Numbers of examples are tried a factor of
    2 apart, then halved (on a logarithmic scale) around three places until neighbours are `resolution` apart: where the
    mean over seeds crosses epsilon, and where Student's interval of the mean does so on either side. What lies between
    the last two is the interval of the complexity; seeds are the same at every number, examples the first of one order.

    Nakkiran et al. (2019) conjecture that a change of the procedure that raises its complexity lowers the test error
    where the complexity is far below or far above the number of examples, and may raise it where they are close.

    Cost: 10 to 20 trainings of `repeats` networks side by side.

    Args:
        objective: of a classifier; its parameters are drawn anew.
        plan: settings; or pass them one by one.
        generator: source of random numbers, or a seed.
        test_data: inputs and labels; without any a fifth of the data is held out.
        progress: told after each training.
        draft: where trainings are kept, from which an interrupted search goes on.

    Raises:
        InputError: for settings out of range, or other data than class labels.

    Reference: Nakkiran, Kaplun, Bansal, Yang, Barak and Sutskever (2019), Deep double descent, definition 1.
    """
    training = plan.training
    shared = setup(objective, training, generator, test_data)
    most = len(shared.data.labels)
    samples = most if plan.samples is None else plan.samples
    if not 2 <= samples <= most:
        raise InputError(f"there are {most} training examples; samples is {samples}.")
    kept, notes, rows = Kept(draft), list(shared.data.notes), list[DescentRow]()
    new = _doubled(most)
    while new:
        jobs = [{"repeats": list(range(plan.repeats)), "values": [n]} for n in sorted(new, reverse=True)]
        rows += trained(shared, jobs, kept, notes, progress, total=usual_trainings(most, plan.resolution))
        found = EffectiveModelComplexity(
            epsilon=plan.epsilon,
            rows=tuple(sorted(rows, key=lambda row: (row.num_samples, row.repeat))),
            samples=samples,
            available=most,
            confidence=plan.confidence,
            num_params=rows[0].num_params,
            label_noise=plan.label_noise,
            loss="squared error" if plan.loss == "squared" else plan.loss.replace("task", "the task's loss"),
            steps=plan.steps,
            notes=tuple(dict.fromkeys(notes)),
        )
        new = _between(found, plan.resolution)
    return found


def usual_trainings(most: int, resolution: float) -> int:
    """Return how many trainings a search among so many examples usually takes: the curves cross in one place or two."""
    return len(_doubled(most)) + 2 * math.ceil(math.log2(max(1.0, math.log(2) / math.log(resolution))))


def _doubled(most: int) -> list[int]:
    """Return numbers of examples a factor of 2 apart, down from all."""
    found = [most]
    while found[-1] // 2 >= _LEAST:
        found.append(found[-1] // 2)
    return found


def _between(found: EffectiveModelComplexity, resolution: float) -> list[int]:
    """Return what to try next: between the neighbours around each crossing, as long as they are too far apart."""
    counts = found.counts
    new = set()
    for place, upwards in ((found.lower, True), (found.value, True), (found.upper, False)):
        if not (0 < place < math.inf):
            continue
        i = int(np.flatnonzero(counts == place)[0])
        other = i + 1 if upwards else i - 1
        if not 0 <= other < len(counts):
            continue
        a, b = sorted((float(counts[i]), float(counts[other])))
        if b / a > resolution and b - a > 1:
            new.add(min(max(round(math.sqrt(a * b)), int(a) + 1), int(b) - 1))
    return sorted(new)
