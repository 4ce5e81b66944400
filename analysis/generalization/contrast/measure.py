"""Trainings that differ in one thing, measured alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.generalization.contrast.layers import changed_inputs, has_batch_norm, with_batch_norm, with_dropout
from analysis.generalization.contrast.results import ContrastRow, Contrasts
from analysis.generalization.data import squared_error
from analysis.generalization.descent.measure import Setup, setup
from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.generalization.kept import Kept
from analysis.generalization.point import curvature_at
from analysis.generalization.width import at_width, width_of
from analysis.noise.measure import gradient_noise
from analysis.run.draft import Draft
from analysis.show.listener import Progress
from curvature.errors import CurvatureError, InputError
from curvature.objective.objective import Objective

__all__ = ["LABELS", "REGULARIZERS", "compared", "prepared"]

LABELS = ("true labels", "shuffled labels", "random labels", "shuffled pixels", "random pixels")
REGULARIZERS = ("none", "weight decay", "dropout", "augmentation", "batch norm", "SAM", "label smoothing")
_PRIME = 1_000_003
_CHECKS = 200  # of the training error, in a training
_ROOMY = 20  # parameters for each example, where the width is not given


def prepared(objective: Objective, plan: Any, generator: torch.Generator, test_data: Any) -> tuple[Setup, list[str]]:
    """Return what all conditions share, the model at its width, and notes."""
    shared = setup(objective, plan, generator, test_data)
    notes, model = list(shared.data.notes), shared.model
    if plan.width is not None:
        model = at_width(model, plan.width)
    elif plan.roomy and sum(p.numel() for p in model.parameters()) < _ROOMY * len(shared.data.labels):
        try:
            model = at_width(model, width_of(model, _ROOMY * len(shared.data.labels)))
        except CurvatureError as error:
            notes.append(f"The model was taken as it is, which may be too small to fit anything: {error}")
    return Setup(**{**vars(shared), "model": model}), notes


def compared(
    shared: Setup,
    conditions: Sequence[str],
    title: str,
    loss: str,
    notes: list[str],
    progress: Progress | None,
    draft: Draft | None,
) -> Contrasts:
    """Train all conditions and return them side by side."""
    plan = shared.plan
    jobs = [{"condition": name} for name in conditions]
    answers = Kept(draft).answers(
        train_condition,
        shared,
        jobs,
        processes=plan.processes,
        notes=notes,
        progress=progress,
        told=lambda rows: f"{rows[0]['condition']}: test error {sum(r['test_error'] for r in rows) / len(rows):.3g}",
    )
    return Contrasts(
        title=title,
        conditions=tuple(conditions),
        rows=tuple(ContrastRow(**{**row, "history": tuple(map(tuple, row["history"]))}) for a in answers for row in a),
        num_samples=len(shared.data.labels),
        num_test=len(shared.data.test_labels),
        num_params=sum(p.numel() for p in shared.model.parameters()),
        num_classes=shared.data.num_classes,
        label_noise=plan.label_noise,
        target=plan.target,
        regulariser=plan.regulariser,
        loss=loss,
        steps=plan.steps,
        notes=tuple(dict.fromkeys(notes)),
    )


def train_condition(shared: Setup, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train the repeats of one condition side by side and return their rows."""
    plan, data, name = shared.plan, shared.data, job["condition"]
    x, labels, test = _data_of(shared, name)
    model, loss, recipe = _procedure(shared, name)
    ensemble = Ensemble(model, [shared.seed + _PRIME * (r + 1) for r in range(plan.repeats)])
    start = [p.detach().clone() for p in ensemble.params.values()]
    R = len(ensemble)
    every = max(1, plan.steps // _CHECKS)
    fitted, measured = [math.nan] * R, [-1] * R
    history: list[list[tuple[int, float]]] = [[] for _ in range(R)]
    rows: list[dict[str, Any]] = [{} for _ in range(R)]

    def read(i: int, step: int, reached: bool) -> None:
        on_train = ensemble.fit(shared.loss, x, labels)
        if not math.isfinite(float(on_train.loss[i])):
            raise InputError(f'the training "{name}" diverged within {step} steps; lower lr, {plan.lr:g} now.')
        moved = torch.stack(
            [
                (p[i].detach() - s[i]).double().square().sum()
                for p, s in zip(ensemble.params.values(), start, strict=True)
            ]
        )
        on_test = ensemble.fit(shared.loss, test, data.test_labels)
        member = ensemble.member(i)
        at = curvature_at(member, shared.loss, x, labels[i], regulariser=plan.regulariser, seed=i)
        whole = copy.deepcopy(member).double()
        noise = gradient_noise(Objective(whole, shared.loss, (x.double(), labels[i])))
        measured[i] = step
        rows[i] = {
            "condition": name,
            "repeat": i,
            "steps": step,
            "reached": reached,
            "train_loss": float(on_train.loss[i]),
            "train_error": float(on_train.error[i]),
            "test_loss": float(on_test.loss[i]),
            "test_error": float(on_test.error[i]),
            "norm": float(ensemble.norms()[i]),
            "distance": float(moved.sum().sqrt()),
            "sharpness": at.sharpness,
            "trace": at.trace,
            "effective_dimension": at.effective_dimension,
            "noise_scale": float(noise.noise_scale.value),
            "noise_trace": float(noise.trace.value),
        }

    def each(step: int) -> bool:
        if step % every and step != plan.steps:
            return False
        fit = ensemble.fit(shared.loss, x, labels)
        for i in range(R):
            history[i].append((step, float(fit.error[i])))
            if math.isnan(fitted[i]) and float(fit.error[i]) == 0:
                fitted[i] = float(step)
            if plan.target > 0 and measured[i] < 0 and float(fit.loss[i]) <= plan.target:
                read(i, step, reached=True)
        return plan.target > 0 and all(m >= 0 for m in measured) and not any(map(math.isnan, fitted))

    change = changed_inputs if name == "augmentation" else None
    taken = ensemble.train(loss, x, labels, recipe, change=change, each=each)
    for i in range(R):
        if measured[i] < 0:
            read(i, taken, reached=plan.target == 0)
        rows[i] |= {"fit_steps": fitted[i], "history": history[i]}
    return rows


def _data_of(shared: Setup, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, labels of each repeat, and test inputs."""
    data, g = shared.data, torch.Generator().manual_seed(shared.seed + 7)
    x, test, labels = data.inputs, data.test_inputs, shared.noisy
    if name == "shuffled labels":
        labels = torch.stack([own[torch.randperm(len(own), generator=g)] for own in labels])
    elif name == "random labels":
        labels = torch.randint(0, data.num_classes, labels.shape, generator=g).to(labels.device)
    elif name in ("shuffled pixels", "random pixels"):
        pixels = x[0].numel()
        same = torch.randperm(pixels, generator=g)
        x, test = (_permuted(part, same if name == "shuffled pixels" else None, g) for part in (x, test))
    return x, labels, test


def _permuted(x: Tensor, order: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return inputs with their entries in one order, or each in an order of its own."""
    flat = x.flatten(1)
    if order is not None:
        return flat[:, order].reshape(x.shape)
    orders = torch.rand(flat.shape, generator=generator).argsort(dim=1)
    return flat.gather(1, orders.to(x.device)).reshape(x.shape)


def _procedure(shared: Setup, name: str) -> tuple[nn.Module, Any, Recipe]:
    """Return model, loss and recipe of a condition."""
    plan, model, loss = shared.plan, shared.model, shared.loss
    recipe: dict[str, Any] = {
        "steps": plan.steps,
        "lr": plan.lr,
        "optimizer": plan.optimizer,
        "batch_size": plan.batch_size,
        "decay": plan.target == 0,
    }
    if name == "weight decay":
        recipe["weight_decay"] = plan.weight_decay
    elif name == "SAM":
        recipe["rho"] = plan.rho
    elif name == "dropout":
        model = with_dropout(copy.deepcopy(model), plan.dropout)
    elif name == "batch norm" and not has_batch_norm(model):
        model = with_batch_norm(copy.deepcopy(model))
    elif name == "label smoothing":
        loss = partial(_smoothed, plan.smoothing, plan.squared)
    return model, loss, Recipe(**recipe)


def _smoothed(smoothing: float, squared: bool, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss on targets (1 - smoothing) one-hot + smoothing / C."""
    if not squared:
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    C = outputs.shape[-1]
    plain = squared_error(outputs, labels)  # |z - t|^2 / 2 with t = (1 - s) e + s / C: expand around e
    shift = smoothing * ((outputs.sum(-1) / C) - outputs.gather(-1, labels[..., None])[..., 0]).mean()
    return plain - shift  # up to a constant
