"""From a task's name to a complete run: load, check, estimate, measure, and write down what it all rested on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.inspection import inspect_model
from analysis.plan import InspectionPlan, estimate_cost
from analysis.results import CostEstimate
from analysis.store import Run, file_sha256, now, versions
from analysis.tasks import Task, load_task
from curvature.errors import CurvatureError, InputError, TaskError
from curvature.evaluation import tensors_in
from curvature.objective import Objective
from curvature.planning import SpectrumPlan

__all__ = ["Listener", "checkpoint_record", "data_sha256", "in_groups", "on_device", "run_inspection"]


class Listener:
    """Told how an inspection gets on; this one keeps it to itself."""

    def loaded(self, task: Task, objective: Objective) -> None:
        """The task is there and its parameters are selected."""

    def doing(self, what: str) -> AbstractContextManager[object]:
        """Something of a few seconds begins; it is over when the context ends."""
        del what
        return nullcontext()

    def estimated(self, estimate: CostEstimate) -> None:
        """It is known what the measurement will cost."""

    def advanced(self, stage: str, done: int, planned: int) -> None:
        """A product was made."""


def run_inspection(
    reference: str,
    plan: InspectionPlan,
    *,
    checkpoint: Path | None = None,
    params: Sequence[str] | None = None,
    device: str | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
    check: bool = True,
    command: str = "",
    listener: Listener | None = None,
) -> Run:
    """Inspect the model of a task and return the results with all that produced them. Nothing is written.

    Args:
        reference: a bundled name, `file.py:function` or `package.module:function`.
        plan: how many eigenvalues, probes and steps.
        checkpoint: parameters to load into the model.
        params: globs over parameter and module names; default: all that require a gradient.
        device: where to compute; default: where the task has its model.
        micro_batch: cut batches into pieces of at most this many examples.
        seed: of the random probes.
        check: whether to run the objective's self-check first.
        command: the command line this came from, for the record.
        listener: told about progress.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    listener = listener or Listener()
    with listener.doing("loading the task"):
        task = on_device(load_task(reference, checkpoint), device)
        objective = task.objective(params=list(params) if params else None, micro_batch=micro_batch)
    listener.loaded(task, objective)
    messages = None
    if check:
        with listener.doing("checking model, loss and data"):
            messages = objective.check().messages
    if micro_batch is None:
        with listener.doing("cutting the data into groups"):
            objective = in_groups(objective)
    with listener.doing("timing one product"):
        estimate = estimate_cost(objective, plan)
    listener.estimated(estimate)
    inspection = inspect_model(
        objective,
        k=plan.k,
        num_bottom=plan.num_bottom,
        rtol=plan.rtol,
        num_probes=plan.num_probes,
        num_steps=plan.num_steps,
        layers=plan.layers,
        coupling=plan.coupling,
        generator=torch.Generator(device=objective.device).manual_seed(seed),
        progress=listener.advanced,
    )
    parameters = ", ".join(params) if params else "all that require a gradient"
    return Run(
        task=reference,
        name=task.name,
        description=task.description,
        metadata=dict(task.metadata),
        settings={"parameters": parameters, **asdict(plan), "micro_batch": micro_batch},
        seed=seed,
        command=command,
        created=now(),
        versions=versions(),
        checkpoint=checkpoint_record(task.checkpoint),
        data_sha256=data_sha256(task.train_data),
        check=messages,
        estimate=estimate,
        inspection=inspection,
    )


def in_groups(objective: Objective) -> Objective:
    """Return the objective with its data in enough pieces for an error over the data, if that is the same function.

    A batch whose examples are coupled, by normalisation, by masks or by its loss, is left whole.
    """
    _, gradient = objective.loss_and_gradient()
    num_batches, most = objective.num_batches, SpectrumPlan().num_groups
    if num_batches is None or num_batches >= SpectrumPlan().least_groups or objective.process_group is not None:
        return objective
    largest = max((t.shape[0] for b in objective.batches() for t in tensors_in(b)[:1] if t.ndim > 0), default=0)
    if largest < most:
        return objective
    pieces = objective.cut(-(-largest // (most // num_batches)))
    try:
        _, of_pieces = pieces.loss_and_gradient()
    except CurvatureError:
        return objective
    same = (of_pieces - gradient).norm() <= 1e-4 * gradient.norm() + torch.finfo(gradient.dtype).eps ** 0.5
    return pieces if bool(same) else objective


def on_device(task: Task, device: str | None) -> Task:
    """Return the task with its model moved; batches follow, since the objective moves each to its parameters."""
    if device is None:
        return task
    target = _available(device)
    if task.prepared is None:
        return replace(task, model=task.model.to(target))
    if task.prepared.device != target:
        raise TaskError(
            f"{task.name} returns a ready-made Objective on {task.prepared.device}, which cannot be moved to {device}: "
            "move the model before it is built, or return an analysis.tasks.Task."
        )
    return task


def _available(name: str) -> torch.device:
    """Return the device, with its index, if tensors can live there."""
    try:
        return torch.zeros(1, device=name).to("cpu").new_zeros(1).to(name).device
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = " and ".join(["cpu", *([accelerator.type] if accelerator is not None else [])])
        raise InputError(f"the device {name!r} cannot be used here; there is {there}.") from error


def checkpoint_record(path: Path | None) -> dict[str, str] | None:
    """Return file name and digest of a checkpoint, for the record."""
    return None if path is None else {"file": path.name, "sha256": file_sha256(path)}


def data_sha256(data: Any) -> str | None:
    """Return a digest of data that are tensors in tuples and lists; None for loaders, which have no one order."""
    digest = hashlib.sha256()

    def feed(part: Any) -> bool:
        if isinstance(part, Tensor):
            array = part.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
            return True
        return isinstance(part, (tuple, list)) and all(feed(item) for item in part)

    return digest.hexdigest() if feed(data) else None
