"""Every kind of run there is, by name: what measures it and what reads it, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from analysis.inspection.study import InspectionRun
    from analysis.run.preparation import Request
    from analysis.run.reservation import Place
    from analysis.run.study import Study, StudyRun
    from analysis.show.listener import Listener
    from curvature.generators import AnyGenerator
    from curvature.objective.objective import Objective

__all__ = ["STUDIES", "inspect", "load_run", "measure", "measure_checkpoints", "study"]

STUDIES = {
    "inspect": ("analysis.inspection.study", "Inspect the curvature of a trained model: its spectrum, layer by layer."),
    "landscape": (
        "analysis.landscape.study",
        "Evaluate the loss around a trained model: along directions, on a plane, on paths to another checkpoint.",
    ),
    "sharpness": ("analysis.sharpness.study", "Compute 27 sharpness measures and their invariances."),
    "conditioning": (
        "analysis.conditioning.study",
        "Measure how ill-conditioned a loss is, layer by layer, and what preconditioners would gain.",
    ),
    "critical": (
        "analysis.critical.study",
        "Classify a point as minimum, saddle, plateau or none of them, and find where the loss falls.",
    ),
    "noise": (
        "analysis.noise.study",
        "Measure the noise of stochastic gradients: noise scale, critical batch size, which layers carry it.",
    ),
    "implicit": (
        "analysis.implicit.study",
        "Measure what SGD adds to the loss: the penalties on the gradient and on its variance over batches.",
    ),
    "track": (
        "analysis.training.study",
        "Train a model and follow its curvature: sharpness against the edge of stability, step by step.",
    ),
    "prune": (
        "analysis.generalization.pruning.study",
        "Remove weights by nine methods, and compare what the loss does with what its curvature predicts.",
    ),
    "lr": (
        "analysis.learning_rate.study",
        "Find the largest stable learning rate of a training, and the best one, by short trainings.",
    ),
    "descent": (
        "analysis.generalization.descent.study",
        "Look for double descent: test error and curvature along width, epochs or number of examples.",
    ),
    "race": (
        "analysis.race.study",
        "Race optimizers: the same budget for each, rates searched, seeds paired, and who is ahead beyond chance.",
    ),
    "complexity": (
        "analysis.generalization.complexity.study",
        "Search how many examples a training procedure can fit, and in which regime a training lies.",
    ),
    "labels": (
        "analysis.generalization.contrast.labels",
        "Fit true, shuffled and random labels side by side: time, norms, curvature and noise.",
    ),
    "regularize": (
        "analysis.generalization.contrast.regularization",
        "Train with six regularisers and without, and compare curvature, noise and test error with paired seeds.",
    ),
    "dimension": (
        "analysis.generalization.dimension.study",
        "Measure the effective dimension: how many directions the data determine beside a regulariser.",
    ),
    "bias": (
        "analysis.generalization.implicit_bias.study",
        "Train linear models on a task's data, and hold which solutions they find against their theorems.",
    ),
}
"""By kind, which is also the name of the command: the module whose STUDY it is, and what it does."""


def study(kind: str) -> Study[Any, Any]:
    """Return the study of a kind.

    Raises:
        InputError: for an unknown kind.
    """
    if kind not in STUDIES:
        from curvature.errors import InputError

        raise InputError(f"there is no measurement {kind!r}; there are {', '.join(STUDIES)}.")
    found: Study[Any, Any] = importlib.import_module(STUDIES[kind][0]).STUDY
    return found


def measure(
    kind: str,
    objective: Objective,
    plan: Any = None,
    *,
    generator: AnyGenerator,
    name: str | None = None,
    check: bool = True,
    listener: Listener | None = None,
    **settings: Any,
) -> StudyRun:
    """Measure an objective as a command of this kind measures a task, and return the same record.

    The record holds the result in the field that its kind names, as `.critical`, `.conditioning`, `.noise`
    (`record.result` is this name), and what produced it: settings, seed, versions, cost. Its `report()` returns the
    report, its `save(folder)` writes the folder of the command with the same page.

    Args:
        kind: one of `STUDIES`: "inspect", "landscape", "sharpness", "conditioning", "critical", "noise", "implicit",
            "track", "lr", "descent", "prune", "race", "complexity", "labels", "regularize", "dimension", "bias".
        objective: the loss at its point.
        plan: the study's settings; or pass them one by one, as its plan names them.
        generator: source of all random numbers, on the objective's device, or a seed.
        name: what the model is called; its class by default.
        check: whether to run the objective's self-check first.
        listener: told about progress.
        **settings: fields of the study's plan.

    Raises:
        InputError: for an unknown kind, or settings out of range.
        CurvatureError: whatever stands in the way, with the remedy.

    Examples:
        >>> import torch
        >>> from curvature import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> run = measure("conditioning", objective, generator=0)  # of (w_1^2 + 4 w_2^2) / 2
        >>> round(run.conditioning.whole.condition.value, 6)  # up to the rounding of float32
        4.0
    """
    from analysis.run.study import study_objective
    from curvature.errors import InputError

    found = study(kind)
    if plan is not None and settings:
        raise InputError(f"give a plan or single settings, not both; {', '.join(settings)} came beside one.")
    plan = found.plan(**settings) if plan is None else plan
    return study_objective(found, objective, plan, generator=generator, name=name, check=check, listener=listener)


def inspect(objective: Objective, plan: Any = None, *, generator: AnyGenerator, **others: Any) -> InspectionRun:
    """Inspect the curvature of an objective: `measure("inspect", ...)`, with the same arguments.

    Examples:
        >>> import torch
        >>> from curvature import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> run = inspect(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))), generator=0)
        >>> [round(x, 4) for x in run.inspection.top.eigenvalues.tolist()]  # of (w_1^2 + 4 w_2^2) / 2
        [4.0, 1.0]
    """
    return cast("InspectionRun", measure("inspect", objective, plan, generator=generator, **others))


def load_run(folder: Path | str) -> StudyRun:
    """Read a run folder of whatever kind; tensors are those that were saved, bit for bit, on the CPU.

    Raises:
        InputError: if the folder holds no complete run, one of an unknown kind, or one written by another version.
    """
    from analysis.run.store import kind_of, load_record

    kind = kind_of(folder)
    if kind in STUDIES:
        record: type[StudyRun] = study(kind).record
        return load_record(folder, record)
    from analysis.compare.study import ComparisonRun
    from curvature.errors import InputError

    if kind != ComparisonRun.kind:
        raise InputError(f"{folder} holds a run of the kind {kind!r}; this version knows {', '.join(STUDIES)}.")
    return load_record(folder, ComparisonRun)


def measure_checkpoints(
    request: Request, checkpoints: Sequence[Path], of: str, *, parent: Path, listener: Listener
) -> tuple[list[StudyRun], list[Path]]:
    """Measure a task at several checkpoints with the usual settings, and return the runs and their folders.

    Each run gets a folder of its own, complete with its report, as soon as it is there.

    Args:
        request: which model, on what; its checkpoint is replaced.
        checkpoints: at least two.
        of: what to measure, a study whose settings all have defaults.
        parent: where the folders go.
        listener: told about progress.

    Raises:
        InputError: for fewer than two checkpoints, or an unknown measurement.
        CurvatureError: whatever stands in the way of a measurement.
    """
    from curvature.errors import InputError

    if len(checkpoints) < 2:
        raise InputError(f"a comparison needs at least two of --checkpoint, got {len(checkpoints)}.")
    if missing := [f.name for f in fields(study(of).plan) if f.default is MISSING]:
        raise InputError(f"{of} takes {', '.join(missing)}; measure each checkpoint, then compare the run folders.")
    runs, folders = [], []
    for checkpoint in checkpoints:
        run, folder = _kept(replace(request, checkpoint=checkpoint), study(of), parent, listener)
        runs.append(run)
        folders.append(folder)
    return runs, folders


def _kept(request: Request, found: Study[Any, Any], parent: Path, listener: Listener) -> tuple[StudyRun, Path]:
    """Measure one checkpoint, with a folder of its own reserved before."""
    from analysis.run.report import write_report
    from analysis.run.reservation import reserve_free
    from analysis.run.saving import save_run
    from analysis.run.study import run_study

    assert request.checkpoint is not None
    stem = request.checkpoint.stem
    places: list[Place] = []
    listener.when_loaded = lambda task, _: places.append(reserve_free(parent, f"{task.name}-{stem}"))
    try:
        run: StudyRun = run_study(found, request, found.plan(), listener=listener)
        save_run(run, places[0], finish=lambda folder: write_report(run, folder))
        return run, places[0].shown
    finally:
        for place in places:
            place.release()
