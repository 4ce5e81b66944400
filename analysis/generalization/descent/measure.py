"""Double descent, measured: what `curvature descent` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from analysis.generalization.data import Labelled, LossName, flipped, labelled, loss_of
from analysis.generalization.descent.random_features import feature_counts, feature_rows
from analysis.generalization.descent.results import DescentCurve, DescentRow
from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.generalization.kept import Kept
from analysis.generalization.point import curvature_at
from analysis.generalization.suited import copy_of, require_suited_loss
from analysis.generalization.width import at_width, width_of
from analysis.records.plan import Plan, from_plan, setting
from analysis.run.draft import Draft
from analysis.show.listener import Progress
from curvature.arguments import checked_fields
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["DescentPlan", "Setup", "double_descent", "setup", "train_job", "trained", "values_of"]

USUAL = 300
"""Training examples along width and epochs, unless others are asked for."""
_POINTS = 12
_SHARES = (0.5, 80.0)  # of parameters over examples, between which widths are tried
_CLOSE = 1.2  # factor between neighbours at the threshold
_PRIME = 1_000_003


@checked_fields
@dataclass(frozen=True, kw_only=True)
class DescentPlan(Plan):
    """What is varied, and how each network is trained."""

    vary: Literal["width", "epochs", "samples"] = setting("width", "What the curve runs along.")
    model: Literal["task", "random-features"] = setting(
        "task", "The task's network, or least squares on random Fourier features of its inputs, solved exactly."
    )
    label_noise: float = setting(
        0.2, "Probability that a training label is another class; test labels stay clean.", least=0, below=1
    )
    samples: int | None = setting(
        None, "Training examples (the most, along samples). Default: 300, or all of them along samples.", least=2
    )
    values: tuple[int, ...] = setting(
        (),
        "Widths, epochs or numbers of examples to try, in place of the usual; given several times.",
        flag="--value N",
    )
    width: int | None = setting(
        None, "Width along epochs and samples: units of the first hidden layer, or features.", least=1
    )
    repeats: int = setting(5, "Repeats, each with its own label noise and parameters.", least=2)
    steps: int = setting(4000, "Steps of the optimizer.", least=1)
    optimizer: Literal["adam", "sgd"] = setting("adam", "Optimizer; sgd has a momentum of 0.9.")
    lr: float = setting(0.01, "Learning rate; along width and samples it falls to a hundredth along a cosine.", above=0)
    weight_decay: float = setting(0.0, "Weight decay, decoupled for adam.", least=0)
    batch_size: int | None = setting(None, "Examples of a batch. Default: all.", least=1)
    loss: LossName = setting("task", "The task's loss, cross-entropy, or half the squared distance to one-hot labels.")
    curvature: bool = setting(True, "Measure the curvature of each network.", flag="--curvature/--no-curvature")
    regulariser: float = setting(
        1.0, "alpha of the effective dimension, beside the loss summed over examples.", above=0
    )
    processes: int | None = setting(None, "Processes that train. Default: one for each core.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "random-features" and self.vary == "epochs":
            raise InputError("random features are solved at once and have no epochs; vary width or samples.")
        if any(value < 1 for value in self.values) or (self.values and len(set(self.values)) < 3):
            raise InputError(f"values must be at least three different numbers from 1 on, got {self.values}.")
        if self.vary == "width" and self.width is not None:
            raise InputError("width is what is varied; choose the widths by values.")
        if self.vary == "samples" and self.values and min(self.values) < 2:
            raise InputError("a training needs at least 2 examples; raise the smallest of values.")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trainings of a curve share; it is sent to the processes that train."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Labelled
    noisy: Tensor
    """(R, N), the labels of each repeat."""
    plan: Any
    seed: int


@from_plan(DescentPlan)
def double_descent(
    objective: Objective,
    plan: DescentPlan,
    *,
    generator: torch.Generator,
    test_data: Any = None,
    progress: Progress | None = None,
    draft: Draft | None = None,
) -> DescentCurve:
    """Measure test error, test loss and curvature along width, epochs or number of examples, repeats side by side.

    Each repeat draws label noise once, for all training examples, and it is the same at every value of the curve:
    differences within a repeat are paired. Fewer examples are the first of the same order. The repeats of one value
    share shapes and are trained as one stack of networks, full-batch unless `batch_size` is given. Along width, values
    are added where the training error comes to 0.

    The interpolation threshold is where the training error of the noisy labels becomes 0 and stays it.

    Cost: `repeats` trainings of `steps` steps for some 12 to 16 values (one for all values along epochs), and the
    eigenvalues of a matrix of the order min(parameters, examples x classes) at each.

    Args:
        objective: of a classifier; copies of its model are drawn anew and trained on its device. Varied in width, it is
            a chain of known layers or has a method `at_width(width)`.
        plan: settings; or pass them one by one.
        generator: source of random numbers, or a seed.
        test_data: inputs and labels, of the objective's structure; without any a fifth of the data is held out.
        progress: told after each training.
        draft: where rows are kept, from which an interrupted curve goes on.

    Raises:
        InputError: for settings out of range, other data than class labels, a model whose width cannot be varied,
            or trainings that all diverge.

    Reference: Belkin, Hsu, Ma and Mandal (2019), Reconciling modern machine-learning practice and the classical
    bias-variance trade-off; Nakkiran et al. (2019), Deep double descent.

    Examples:
        >>> from torch import nn
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(100, 5, generator=g), torch.randint(0, 2, (100,), generator=g)
        >>> net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> curve = double_descent(
        ...     Objective(net, nn.CrossEntropyLoss(), (x, y)), model="random-features", samples=40, generator=0
        ... )
        >>> curve.peak("test_loss").value, curve.threshold.upper  # features: as many as examples
        (40.0, 40.0)
    """
    shared = setup(objective, plan, generator, test_data)
    data, notes = shared.data, list(shared.data.notes)
    rows: list[DescentRow] = []
    if plan.model == "random-features":
        rows = [DescentRow(**row) for row in feature_rows(shared, values_of(shared))]
    else:
        kept = Kept(draft)
        rows = trained(shared, _jobs(shared, values_of(shared)), kept, notes, progress)
        if plan.vary == "width" and not plan.values:
            closer = _closer(_curve(shared, rows, notes))
            rows += trained(shared, _jobs(shared, closer), kept, notes, progress)
    if plan.vary != "samples" and plan.samples is None and len(data.labels) == USUAL:
        notes.append(f"The networks were trained on {USUAL} examples; --samples takes more of them.")
    curve = _curve(shared, rows, notes)
    if not np.isfinite(curve.of("test_loss")).all(axis=1).any():
        raise InputError(f"at each value of the curve a training diverged; lower lr, {plan.lr:g} now.")
    return curve


def setup(objective: Objective, plan: Any, generator: torch.Generator, test_data: Any) -> Setup:
    """Return what all trainings share: data, labels with noise for each repeat, loss.

    Raises:
        InputError: for data that are no class labels, or fewer than asked for, or a loss in which some count more.
    """
    seed = generator.initial_seed() % 2**40
    data = labelled(objective, test_data, seed)
    wanted = plan.samples
    if wanted is None and getattr(plan, "vary", "") != "samples":
        wanted = min(USUAL, len(data.labels))
    if wanted is not None:
        if wanted > len(data.labels):
            raise InputError(f"there are {len(data.labels)} training examples; samples is {wanted}.")
        data = data.first(wanted)
    own = [
        flipped(data.labels, plan.label_noise, data.num_classes, seed + _PRIME * (r + 1)) for r in range(plan.repeats)
    ]
    noisy = torch.stack(own)
    loss = loss_of(objective, plan.loss, data.one_hot)
    if objective.num_params != sum(p.numel() for p in objective.model.parameters()):
        raise InputError("networks are trained in all their parameters; give an objective of all of them (no params=).")
    if getattr(plan, "model", "task") == "task":
        data, noisy = data.to(objective.device), noisy.to(objective.device)
        require_suited_loss(loss, data.labels, data.num_classes, objective.dtype)
    elif objective.device.type != "cpu":
        data = replace(data, notes=(*data.notes, "Random features are solved on the CPU; the device had no part."))
    model = copy_of(objective.model)  # the objective's own stays as it is
    return Setup(model=model, loss=loss, data=data, noisy=noisy, plan=plan, seed=seed)


def values_of(shared: Setup) -> list[int]:
    """Return the values that a curve begins with, ascending."""
    plan, most = shared.plan, len(shared.data.labels)
    if plan.values:
        if plan.vary == "samples" and max(plan.values) > most:
            raise InputError(f"there are {most} training examples; the largest of values is {max(plan.values)}.")
        if plan.vary == "epochs" and max(plan.values) > _epochs(shared):
            raise InputError(f"{plan.steps} steps are {_epochs(shared)} epochs; raise steps for {max(plan.values)}.")
        return sorted(set(plan.values))
    if plan.model == "random-features" and plan.vary == "width":
        return feature_counts(most)
    if plan.model == "random-features":
        width = plan.width or most // 2
        return [n for n in feature_counts(width) if 2 <= n <= most]
    if plan.vary == "epochs":
        return _spaced(1, _epochs(shared), 20)
    if plan.vary == "samples":
        return _spaced(min(20, most), most, _POINTS)
    low, high = (width_of(shared.model, share * most) for share in _SHARES)
    return _spaced(low, high, _POINTS)


def _epochs(shared: Setup) -> int:
    size = shared.plan.batch_size or len(shared.data.labels)
    return max(1, shared.plan.steps // -(-len(shared.data.labels) // size))


def _spaced(low: int, high: int, count: int) -> list[int]:
    """Return whole numbers from low to high, evenly spaced on a logarithmic scale."""
    if high <= low:
        return [low]
    return sorted({round(low * (high / low) ** (i / (count - 1))) for i in range(count)})


def _closer(curve: DescentCurve) -> list[int]:
    """Return widths between those around the interpolation threshold, where they are further apart than a fifth."""
    values, threshold = curve.values, curve.threshold
    if not threshold.found:
        return []
    first = max(0, int((values < threshold.lower).sum()) - 1)
    last = min(len(values) - 1, int((values <= threshold.upper).sum()))
    found = []
    for a, b in zip(values[first:last], values[first + 1 : last + 1], strict=True):
        if b / a > _CLOSE and b - a > 1:
            found.append(round(math.sqrt(a * b)))
    return [value for value in found if value not in values]


def _jobs(shared: Setup, values: Sequence[int]) -> list[dict[str, Any]]:
    """Return what is trained apart, the longest first."""
    plan = shared.plan
    if plan.vary == "epochs":
        return [{"repeats": [r], "values": list(values)} for r in range(plan.repeats)]
    return [{"repeats": list(range(plan.repeats)), "values": [value]} for value in sorted(values, reverse=True)]


def _curve(shared: Setup, rows: Sequence[DescentRow], notes: Sequence[str]) -> DescentCurve:
    plan, data = shared.plan, shared.data
    exact = plan.model == "random-features"
    return DescentCurve(
        vary=plan.vary,
        model=plan.model,
        rows=tuple(sorted(rows, key=lambda row: (row.value, row.repeat))),
        num_samples=len(data.labels),
        num_test=len(data.test_labels),
        num_classes=data.num_classes,
        label_noise=plan.label_noise,
        loss="squared error" if exact or plan.loss == "squared" else plan.loss.replace("task", "the task's loss"),
        regulariser=plan.regulariser,
        steps=0 if exact else plan.steps,
        notes=tuple(dict.fromkeys(notes)),
    )


def trained(
    shared: Setup, jobs: list[dict[str, Any]], kept: Kept, notes: list[str], progress: Progress | None, total: int = 0
) -> list[DescentRow]:
    """Return the rows of some jobs, those of earlier calls as they were."""
    count, told = shared.plan.processes, partial(_told, shared)
    answers = kept.answers(
        train_job, shared, jobs, processes=count, notes=notes, progress=progress, told=told, total=total
    )
    return [DescentRow(**row) for rows in answers for row in rows]


def _told(shared: Setup, rows: list[dict[str, Any]]) -> str:
    last = max(rows, key=lambda row: row["value"])
    error = sum(row["test_error"] for row in rows if row["value"] == last["value"]) / sum(
        row["value"] == last["value"] for row in rows
    )
    return f"{shared.plan.vary} {last['value']}: test error {100 * error:.1f} %"


def train_job(shared: Setup, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train the repeats of one value, or one repeat through all epochs, and return its rows."""
    plan, data, repeats = shared.plan, shared.data, job["repeats"]
    along = plan.vary
    n = job["values"][0] if along == "samples" else len(data.labels)
    width = job["values"][0] if along == "width" else plan.width
    model = shared.model if width is None else at_width(shared.model, width)
    x, labels = data.inputs[:n], shared.noisy[repeats, :n]
    ensemble = Ensemble(model, [shared.seed + _PRIME * (r + 1) for r in repeats])
    start = ensemble.gradient_norms(shared.loss, x, labels)
    per_epoch = -(-n // min(n, plan.batch_size or n))
    marks = {value * per_epoch: value for value in job["values"]} if along == "epochs" else {}
    rows: list[dict[str, Any]] = []

    def read(value: float) -> None:
        train = ensemble.fit(shared.loss, x, labels)
        test = ensemble.fit(shared.loss, data.test_inputs, data.test_labels)
        gradient = ensemble.gradient_norms(shared.loss, x, labels) / start
        for i, repeat in enumerate(repeats):
            row = {
                "value": float(value),
                "repeat": repeat,
                "num_params": ensemble.num_params,
                "num_samples": n,
                "train_loss": float(train.loss[i]),
                "train_error": float(train.error[i]),
                "test_loss": float(test.loss[i]),
                "test_error": float(test.error[i]),
                "gradient": float(gradient[i]),
                "norm": float(ensemble.norms()[i]),
            }
            if plan.curvature and math.isfinite(row["train_loss"]):
                member = ensemble.member(i)
                found = curvature_at(member, shared.loss, x, labels[i], regulariser=plan.regulariser, seed=repeat)
                row |= vars(found)
            rows.append(row)

    def each(step: int) -> bool:
        if step in marks:
            read(marks[step])
        return False

    recipe = Recipe(
        steps=max(marks) if marks else plan.steps,
        lr=plan.lr,
        optimizer=plan.optimizer,
        batch_size=plan.batch_size,
        weight_decay=plan.weight_decay,
        decay=along != "epochs",
    )
    ensemble.train(shared.loss, x, labels, recipe, each=each)
    if along != "epochs":
        read(job["values"][0])
    return rows
