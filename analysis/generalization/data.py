"""Labelled data for trainings that are repeated: which examples, whose labels are wrong, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["Labelled", "LossName", "flipped", "labelled", "loss_of", "squared_error"]

LossName = Literal["task", "cross-entropy", "squared"]

HELD_OUT = 5
"""Without test data, every so-manieth example of an order drawn at random is held out."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples with class labels, on the CPU."""

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


def labelled(objective: Objective, test_data: Any, seed: int, count: int | None = None) -> Labelled:
    """Return the data of an objective as examples with class labels.

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
    inputs, targets = _joined(objective.batches(), "the data of the objective")
    notes: tuple[str, ...] = ()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    if test_data is None:
        held, order = order[::HELD_OUT], order[[i for i in range(len(order)) if i % HELD_OUT]]
        test_inputs, test_targets = inputs[held], targets[held]
        notes = (f"The task has no test data: {len(held)} of its examples, drawn by the seed, were held out.",)
    else:
        batches = [test_data] if isinstance(test_data, tuple) else test_data
        test_inputs, test_targets = _joined(batches, "the test data")
    inputs, targets = inputs[order], targets[order]
    one_hot = targets.is_floating_point()
    labels, test_labels = _classes(targets), _classes(test_targets)
    if count is not None and not 2 <= count <= len(inputs):
        raise InputError(f"samples must be between 2 and the {len(inputs)} training examples there are, got {count}.")
    with torch.no_grad():
        outputs = objective.model(inputs[:2].to(objective.device))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError("this needs a classifier whose outputs are of shape (examples, classes).")
    classes = outputs.shape[1]
    most = int(max(labels.max(), test_labels.max())) + 1
    if most > classes:
        raise InputError(f"there are labels up to {most - 1}, and the model has {classes} outputs.")
    return Labelled(
        inputs=inputs[:count],
        labels=labels[:count],
        test_inputs=test_inputs,
        test_labels=test_labels,
        num_classes=classes,
        one_hot=one_hot,
        notes=notes,
    )


def _joined(batches: Any, what: str) -> tuple[Tensor, Tensor]:
    pairs = list(batches)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise InputError(f"{what} must be pairs (inputs, labels) of tensors, got {type(pair).__name__}.")
    if not pairs:
        raise InputError(f"{what} are empty.")
    inputs, targets = (torch.cat([pair[i].detach().cpu() for pair in pairs]) for i in (0, 1))
    return inputs, targets


def _classes(targets: Tensor) -> Tensor:
    if targets.ndim == 1 and not targets.is_floating_point():
        return targets.long()
    if targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(1) == 1).all()):
        return targets.argmax(dim=1)
    raise InputError(
        "labels must be class numbers (N,), or one-hot rows (N, classes); label noise has no meaning for others. "
        f"Got {tuple(targets.shape)} of {targets.dtype}."
    )


def flipped(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Return labels of which each is, with probability `rate`, one of the other classes, all alike (Nakkiran 2019)."""
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
