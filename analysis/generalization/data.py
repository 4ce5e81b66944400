"""Labelled data for trainings that are repeated: which examples, whose labels are wrong, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.generalization.suited import copy_of
from analysis.run.preparation import fingerprint
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["Labelled", "LossName", "examples", "flipped", "labelled", "loss_of", "squared_error"]

LossName = Literal["task", "cross-entropy", "squared"]

HELD_OUT = 5
"""Without test data, every so-manieth example of an order drawn at random is held out."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples with class labels."""

    inputs: Tensor
    """(N, ...), for training, in an order drawn by the seed."""
    labels: Tensor
    """(N,), int64."""
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    one_hot: bool
    """Whether the task has its labels as one-hot rows."""
    notes: tuple[str, ...] = ()

    def first(self, count: int) -> Labelled:
        """Return the same with only the first examples for training."""
        return Labelled(**{**vars(self), "inputs": self.inputs[:count], "labels": self.labels[:count]})

    def to(self, device: torch.device) -> Labelled:
        """Return the same on a device."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return Labelled(**{**vars(self), **tensors})


def labelled(objective: Objective, test_data: Any, seed: int, count: int | None = None) -> Labelled:
    """Return the data of an objective as examples with class labels, on the CPU.

    Args:
        objective: of a classifier: outputs (N, C), targets class numbers (N,) or one-hot rows (N, C).
        test_data: of the same structure as the objective's; without any, a fifth of these is held out.
        seed: of the order.
        count: so many for training at most; None for all.

    Raises:
        InputError: for other data, or fewer than asked for.
    """
    if objective.process_group is not None:
        raise InputError("this trains in one process; give an objective without process_group.")
    if objective.settings["forward"] is not None or objective.settings["loss"] is None:
        raise InputError("this trains model(inputs) with loss(outputs, labels); give an objective without forward=.")
    inputs, targets = examples(objective)
    notes: tuple[str, ...] = ()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    if test_data is None:
        held, order = order[::HELD_OUT], order[[i for i in range(len(order)) if i % HELD_OUT]]
        test_inputs, test_targets = inputs[held], targets[held]
        notes = (f"The task has no test data: {len(held)} of its examples, drawn by the seed, were held out.",)
    else:
        batches = [test_data] if isinstance(test_data, tuple) else test_data
        test_inputs, test_targets = _joined(batches, "the test data")
        if (test_inputs.shape[1:], test_inputs.dtype) != (inputs.shape[1:], inputs.dtype):
            raise InputError(
                f"test inputs must be like those of training, (N, {', '.join(map(str, inputs.shape[1:]))}) of "
                f"{inputs.dtype}; got {tuple(test_inputs.shape)} of {test_inputs.dtype}. Convert the test data."
            )
    inputs, targets = inputs[order], targets[order]
    for given, what in ((inputs, "the data of the objective"), (test_inputs, "the test data")):
        if given.is_floating_point() and not bool(torch.isfinite(given).all()):
            raise InputError(f"{what} have inputs that are NaN or infinite; leave these examples out, or clean them.")
    if len(inputs) < 2:
        raise InputError(f"a training takes at least 2 examples beside those held out; there are {len(inputs)}.")
    one_hot = targets.ndim == 2
    labels, test_labels = _classes(targets), _classes(test_targets)
    if count is not None and not 2 <= count <= len(inputs):
        raise InputError(f"samples must be between 2 and the {len(inputs)} training examples there are, got {count}.")
    classes = _num_classes(objective, inputs[:2])
    for own, what in ((labels, "training"), (test_labels, "test")):
        outside = (own < 0) | (own >= classes)
        if bool(outside.any()):
            raise InputError(
                f"labels must be 0 to {classes - 1}, as the model has {classes} outputs; {int(outside.sum())} of the "
                f"{what} labels are not, such as {int(own[outside][0])}. Leave these examples out of the data."
            )
    return Labelled(
        inputs=inputs[:count],
        labels=labels[:count],
        test_inputs=test_inputs,
        test_labels=test_labels,
        num_classes=classes,
        one_hot=one_hot,
        notes=notes,
    )


def _num_classes(objective: Objective, inputs: Tensor) -> int:
    model = copy_of(objective.model).eval()  # statistics of normalisation stay as they are
    try:
        with torch.no_grad():
            outputs = model(inputs.to(objective.device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"the model does not run on two examples, inputs {tuple(inputs.shape)} of {inputs.dtype} "
            f"({' '.join(str(error).split())[:200]}); give model and data of one shape and dtype."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError("this needs a classifier whose outputs are of shape (examples, classes).")
    return outputs.shape[1]


def examples(objective: Objective) -> tuple[Tensor, Tensor]:
    """Return inputs and targets on the CPU, in one order each time: where a loader shuffles, by their digests.

    Raises:
        InputError: for data that are not pairs of tensors, an example a row.
    """
    what = "the data of the objective"
    inputs, targets = _joined(objective.batches(), what)
    if isinstance(objective.settings["data"], (tuple, list)):
        return inputs, targets
    again = _joined(objective.batches(), what)
    if torch.equal(inputs, again[0]) and torch.equal(targets, again[1]):
        return inputs, targets
    digests = [fingerprint(x, y) for x, y in zip(inputs, targets, strict=True)]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return inputs[order], targets[order]


def _joined(batches: Any, what: str) -> tuple[Tensor, Tensor]:
    pairs = list(batches)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise InputError(f"{what} must be pairs (inputs, labels) of tensors, got {type(pair).__name__}.")
        if any(t.ndim == 0 for t in pair) or len(pair[0]) != len(pair[1]):
            shapes = " and ".join(str(tuple(t.shape)) for t in pair)
            raise InputError(f"{what} must have a label for each example; a batch has inputs and labels of {shapes}.")
    if sum(len(pair[0]) for pair in pairs) == 0:
        raise InputError(f"{what} are empty; give at least one example.")
    for i, of in ((0, "inputs"), (1, "labels")):
        kinds = sorted({f"(N, {', '.join(map(str, pair[i].shape[1:]))}) of {pair[i].dtype}" for pair in pairs})
        if len(kinds) > 1:
            raise InputError(f"{what} must have {of} of one shape and dtype in all batches, got {' and '.join(kinds)}.")
    inputs, targets = (torch.cat([pair[i].detach().cpu() for pair in pairs]) for i in (0, 1))
    return inputs, targets


def _classes(targets: Tensor) -> Tensor:
    if targets.ndim == 1 and not (targets.is_floating_point() or targets.is_complex()):
        return targets.long()
    if targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(1) == 1).all()):
        return targets.long().argmax(dim=1)
    raise InputError(
        "labels must be class numbers (N,), or one-hot rows (N, classes); label noise has no meaning for others. "
        f"Got {tuple(targets.shape)} of {targets.dtype}."
    )


def flipped(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Return labels of which each is, with probability `rate`, one of the others, all alike (Nakkiran et al. 2019)."""
    g = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=g) < rate
    shift = torch.randint(1, max(2, num_classes), (len(labels),), generator=g)
    return torch.where(wrong, (labels + shift) % num_classes, labels)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return half the squared distance to the one-hot label, summed over classes and averaged over examples."""
    return 0.5 * (outputs - _one_hot(labels, outputs)).square().sum(-1).mean()


def _one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return labels as rows of zeros and a one; `F.one_hot` does not run under vmap."""
    places = torch.arange(outputs.shape[-1], device=labels.device)
    return (labels[..., None] == places).to(outputs.dtype)


def loss_of(objective: Objective, name: LossName, one_hot: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `loss(outputs, labels)` of class labels."""
    if name == "cross-entropy":
        return F.cross_entropy
    if name == "squared":
        return squared_error
    own = objective.settings["loss"]
    return partial(_on_one_hot, own) if one_hot else own


def _on_one_hot(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor) -> Tensor:
    return loss(outputs, _one_hot(labels, outputs))
