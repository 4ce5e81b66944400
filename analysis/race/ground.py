"""What all trainings of a race share: the loss, its start, held-out and test data, and how a point is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from analysis.noise.measure import gradient_noise
from analysis.race.plan import RacePlan
from analysis.race.results import CoursePoint, Trait
from analysis.sharpness.measure import measure_sharpness
from analysis.training.accuracy import accuracy, classifies
from analysis.training.loop import initialise
from curvature.data.parts import num_examples, take
from curvature.errors import CurvatureError, InputError, NonFiniteError
from curvature.objective.objective import Objective

__all__ = ["Ground", "prepare_ground"]


@dataclass(frozen=True)
class Ground:
    """The objective and its company."""

    plan: RacePlan
    seed: int
    objective: Objective
    """The training loss; of what is left where examples are held out."""
    drawn: bool
    """Whether the batches are those that a loader which shuffles has drawn once, so that trainings can share them."""
    validation: Objective | None
    test: Objective | None
    metric: Literal["accuracy", "test loss", ""]
    fresh: bool
    """Whether parameters are drawn by the seed."""
    batch_size: float
    per_epoch: int
    """Batches in an epoch."""

    def begin(self, seed: int) -> None:
        """Put model and random numbers where all trainings of a seed begin; the model holds what the task has."""
        torch.manual_seed(self.seed + seed)
        if self.fresh:
            initialise(self.objective.model)
        self.objective.model.train()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the model between steps, in eval mode."""
        self.objective.model.eval()
        try:
            yield
        finally:
            self.objective.model.train()

    def look(self, steps: int, seconds: float, gradients: float, *, test: bool) -> CoursePoint:
        """Return how the training stands."""
        with self.looking():
            return CoursePoint(
                steps=steps,
                seconds=seconds,
                gradients=gradients,
                loss=_loss(self.objective),
                validation=math.nan if self.validation is None else _loss(self.validation),
                metric=self._metric() if test else math.nan,
            )

    def _metric(self) -> float:
        if self.test is None:
            return math.nan
        return accuracy(self.test) if self.metric == "accuracy" else _loss(self.test)

    def traits(self, seed: int) -> tuple[tuple[Trait, ...], str]:
        """Return sharpness and noise of the point where the model is, and why something is not among them."""
        found, missing = list[Trait](), list[str]()
        with self.looking():
            self.objective.release()
            if names := self.plan.sharpness():
                try:
                    table = measure_sharpness(self.objective, measures=names, generator=self.seed + seed)
                    found += [Trait(name=row.name, value=row.value, stderr=row.stderr) for row in table.rows]
                except CurvatureError as error:
                    missing.append(f"Sharpness was not measured: {error}")
            if self.plan.noise:
                try:
                    noise = gradient_noise(self.objective)
                    found.append(Trait(name="noise", value=noise.trace.value, stderr=noise.trace.stderr))
                except CurvatureError as error:
                    missing.append(f"Noise was not measured: {error}")
            self.objective.release()
        return tuple(found), " ".join(missing)


def prepare_ground(objective: Objective, plan: RacePlan, *, test_data: Any, seed: int) -> Ground:
    """Return the ground of a race.

    Raises:
        InputError: for data that cannot be cut or held out, or several ranks.
    """
    if objective.process_group is not None:
        raise InputError("a race trains in processes of its own; give an objective without process_group.")
    validation = None
    if plan.validation > 0:
        objective, validation = _held_out(objective, plan.validation, seed)
    test = None if test_data is None else objective.replace(data=test_data)
    batches = list(objective.batches())
    for _ in objective.batches():  # a second pass shows whether a loader shuffles
        pass
    if drawn := objective.shuffles:
        objective = objective.replace(data=batches)
    examples = sum(num_examples(batch) for batch in batches)
    if plan.batch_size is not None and len(batches) > 1:
        raise InputError("batch_size cuts data that are one batch of tensors; leave it out for data that are several.")
    size = examples / len(batches) if plan.batch_size is None else float(min(plan.batch_size, examples))
    return Ground(
        plan=plan,
        seed=seed,
        objective=objective,
        drawn=drawn,
        validation=validation,
        test=test,
        metric="" if test is None else "accuracy" if classifies(test) else "test loss",
        fresh=plan.start == "fresh" or (plan.start == "auto" and _can_draw(objective)),
        batch_size=size,
        per_epoch=max(1, math.ceil(examples / max(size, 1.0))),
    )


def _can_draw(objective: Objective) -> bool:
    """Return whether all parameters are trained, and all modules that hold some can draw them anew."""
    trained = {id(p) for p in objective.space.tensors.values()}
    if any(id(p) not in trained for p in objective.model.parameters()):
        return False  # a part that is kept is not to be lost
    with_own = [m for m in objective.model.modules() if m._parameters]
    return bool(with_own) and all(callable(getattr(m, "reset_parameters", None)) for m in with_own)


def _held_out(objective: Objective, share: float, seed: int) -> tuple[Objective, Objective]:
    batches = list(objective.batches())
    count = num_examples(batches[0])
    held = round(share * count)
    if len(batches) > 1 or not 0 < held < count:
        raise InputError(
            f"validation={share:g} holds out examples of data that are one batch of tensors, and leaves some on either "
            f"side; here are {len(batches)} batches, the first with {count} examples."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    kept, out = (take(batches[0], sorted(rows), count) for rows in (order[held:], order[:held]))
    return objective.replace(data=kept), objective.replace(data=out)


def _loss(objective: Objective) -> float:
    try:
        return float(objective.loss())
    except NonFiniteError:
        return math.nan
