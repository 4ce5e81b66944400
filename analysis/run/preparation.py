"""Before any measurement: the task loaded and on its device, the objective checked, its data in groups."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.records.plain import plain_values
from analysis.records.plan import Plan, setting
from analysis.run.cores import in_background, is_tiny, one_thread
from analysis.run.processes import share
from analysis.run.record import now, versions
from analysis.show.listener import Listener
from analysis.show.wording import count
from analysis.tasks import Task, load_task
from analysis.tasks.checkpoint_files import files_of, sha256_of
from curvature.data.tensors import tensors_in
from curvature.errors import InputError, TaskError
from curvature.objective.objective import Objective
from curvature.objective.pieces import in_pieces
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["Prepared", "Request", "data_sha256", "fingerprint", "in_groups", "load", "prepare"]

_GROUPED = 10**8  # numbers in the vectors of all groups together: a product writes those of each, few data or many
_MOST_NAMES = 20  # of parameters in a record


@dataclass(frozen=True, kw_only=True)
class Request(Plan):
    """Which model to measure, on what, and how it was asked for."""

    task: str = setting(
        flag="TASK",
        text="A bundled name (digits-cnn, digits-mlp, text-gpt; untrained digits-tanh, mnist1d-mlp), file.py:function "
        "or package.module:function.",
    )
    checkpoint: Path | None = setting(
        None,
        "Parameters to load into the model: a file of torch.save or safetensors, or a Hugging Face folder.",
        flag="--checkpoint FILE",
    )
    checkpoint_key: str | None = setting(
        None, "Which state dict of the checkpoint, if it holds several: state_dict_ema.", flag="--checkpoint-key KEY"
    )
    params: tuple[str, ...] | None = setting(
        None, "Only parameters or modules that match; may be given several times.", flag="--params GLOB"
    )
    device: str | None = setting(None, "Where to compute: cpu, cuda, cuda:1. Default: where the task has its model.")
    micro_batch: int | None = setting(
        None, "Cut batches into pieces of at most N examples, to save memory.", flag="--micro-batch N"
    )
    seed: int = setting(0, "Seed of all random numbers.", least=0, most=2**63 - 1)
    check: bool = setting(True, "Check model, loss and data before the work.")
    command: str = ""
    """The command line this came from, for the record."""

    def settings(self, objective: Objective) -> dict[str, Any]:
        """Return what belongs among the settings of a record, of an objective that was made for this or given."""
        micro_batch = objective.settings["micro_batch"] if self.micro_batch is None else self.micro_batch
        settings = {"parameters": ", ".join(self.params or _chosen(objective)), "micro_batch": micro_batch}
        return settings if self.checkpoint_key is None else {**settings, "checkpoint_key": self.checkpoint_key}


def _chosen(objective: Objective) -> tuple[str, ...]:
    """Return the names of the parameters, if they are not all that require a gradient."""
    space = objective.space
    trained = {id(p) for p in objective.model.parameters() if p.requires_grad}
    if trained == set(map(id, space.tensors.values())):
        return ("all that require a gradient",)
    return space.names if len(space.names) <= _MOST_NAMES else (*space.names[:_MOST_NAMES], "...")


@dataclass(frozen=True)
class Prepared:
    """A task and its objective, ready to be measured."""

    task: Task
    objective: Objective
    messages: tuple[str, ...] | None
    """What the self-check found; None if it was switched off."""

    def record(self, request: Request) -> dict[str, Any]:
        """Return the fields of `analysis.run.record.Record` but `settings`."""
        shared = self.task.prepared is None and self.objective.ranks is not None
        return {
            "task": request.task,
            "name": self.task.name,
            "description": self.task.description,
            "metadata": plain_values(dict(self.task.metadata)),
            "seed": request.seed,
            "command": request.command,
            "created": now(),
            "versions": versions(),
            "checkpoint": None if (read := self.task.checkpoint_record) is None else dict(read),
            "data_sha256": data_sha256(self.task.train_data if shared else self.objective.settings["data"]),
            "check": self.messages,
        }


def load(request: Request, listener: Listener) -> tuple[Task, Objective]:
    """Return the task on its device and the objective of the parameters asked for.

    Raises:
        CurvatureError: whatever stands in the way, with the remedy.
    """
    with listener.doing("loading the task"):
        task = _on_device(_task(request), request.device)
        params = list(request.params) if request.params else None
        objective = task.objective(params=params, micro_batch=request.micro_batch, **share(task))
    size = f"{count(objective.num_params)} parameters in {len(objective.space.names)} tensors"
    what = f"{task.name}: {task.description}" if task.description else task.name
    listener.loaded(what, f"{size}, {str(objective.dtype).removeprefix('torch.')} on {objective.device}")
    if listener.when_loaded is not None:
        listener.when_loaded(task, objective)
    return task, objective


@contextlib.contextmanager
def prepare(
    task: Task, objective: Objective, request: Request, listener: Listener, *, groups: bool = True
) -> Iterator[tuple[Objective, Callable[[], Prepared]]]:
    """Check the objective if asked to, and, with `groups`, cut its data into groups unless the user cut them.

    Yields the objective, and what waits for the check: that of a tiny objective goes on beside what is done inside.

    Raises:
        CurvatureError: as `Objective.check`.
    """
    with contextlib.ExitStack() as beside:
        checked: Callable[[], tuple[str, ...] | None] = lambda: None  # noqa: E731 - replaced where there is a check
        if request.check:
            with listener.doing("checking model, loss and data"):
                checked = beside.enter_context(in_background(objective, lambda: objective.check().messages))
        ready = objective
        if groups and request.micro_batch is None:
            threads = one_thread() if is_tiny(objective) else contextlib.nullcontext()
            with listener.doing("cutting the data into groups"), threads:
                ready = in_groups(objective)

        def wait() -> Prepared:
            with listener.doing("checking model, loss and data"):
                return Prepared(task, ready, checked())

        yield ready, wait


def in_groups(objective: Objective) -> Objective:
    """Return the objective with its data in enough pieces for an error over the data, if that is the same function.

    They are 16 where vectors are short and 4 where a vector has 25 million entries or more, since a product makes one
    for every piece.
    A batch whose examples are coupled, by normalisation, by masks or by its loss, is left whole.
    """
    objective.loss()  # which counts the batches
    num_batches, least = objective.num_batches, SpectrumPlan().least_groups
    most = min(SpectrumPlan().num_groups, max(least, _GROUPED // objective.num_params))
    if num_batches is None or num_batches >= least or objective.process_group is not None:
        return objective
    largest = max((t.shape[0] for b in objective.batches() for t in tensors_in(b)[:1] if t.ndim > 0), default=0)
    if largest < most:
        return objective
    return in_pieces(objective, -(-largest // max(most // num_batches, -(-least // num_batches))))


def _task(request: Request) -> Task:
    task = load_task(request.task, request.checkpoint, checkpoint_key=request.checkpoint_key)
    if task.checkpoint is None or task.checkpoint_record is not None:
        return task
    path = Path(task.checkpoint)  # which the user's function says it has read
    return replace(task, checkpoint_record={"file": path.name, "sha256": sha256_of(files_of(path))})


def _on_device(task: Task, device: str | None) -> Task:
    """Return the task with model and loss moved; batches follow, since the objective moves each to its parameters."""
    if device is None:
        return task
    target = _available(device)
    if task.prepared is None:
        loss = task.loss.to(target) if isinstance(task.loss, nn.Module) else task.loss  # it may hold class weights
        return replace(task, model=task.model.to(target), loss=loss)
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


def data_sha256(data: Any) -> str | None:
    """Return a digest of data that are tensors in tuples and lists; None for loaders, which have no one order."""
    tensors: list[Tensor] = []

    def gather(part: Any) -> bool:
        if isinstance(part, Tensor) and not part.is_nested and part.layout == torch.strided:
            tensors.append(part)
            return True
        return isinstance(part, (tuple, list)) and all(gather(item) for item in part)

    return fingerprint(*tensors) if gather(data) else None


def fingerprint(*tensors: Tensor) -> str:
    """Return a digest of shapes, dtypes and all bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
