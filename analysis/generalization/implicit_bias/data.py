"""A task as linear models see it: standardised inputs, their correlation with the targets, and a matrix to complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.generalization.data import examples
from curvature.errors import InputError
from curvature.objective.objective import Objective

__all__ = ["LinearData", "linear_data"]

_LEAST = 1e-6  # of the largest spread, singular value or length: what is below does not vary, or depends on others


@dataclass(frozen=True, kw_only=True)
class LinearData:
    """What the linear models are trained on, float64 on the CPU."""

    X: Tensor
    """(n, d), examples that do not depend on each other: inputs of mean 0 and variance 1 over all examples."""
    teacher: Tensor
    """(d,), weights of which a few are 1, the others 0."""
    correlation: Tensor
    """(k, r), of targets and whitened inputs, its largest singular value 1."""
    matrix: Tensor
    """(m, d), of low rank, its largest singular value 1."""
    observed: Tensor
    """(m, d), boolean."""
    notes: tuple[str, ...]


def linear_data(
    objective: Objective,
    seed: int,
    *,
    inputs: int,
    wanted: int | None,
    teacher: int,
    rank: int,
    hidden: float,
) -> LinearData:
    """Return the data of an objective for linear models.

    Args:
        objective: whose data are pairs (inputs, targets).
        seed: of the order of examples, the teacher and the hidden entries.
        inputs: so many at most, those that vary most.
        wanted: n; None for half as many as inputs.
        teacher: how many of its weights are 1; half of them at most.
        rank: of the matrix, at most.
        hidden: share of its entries that are not observed.

    Raises:
        InputError: for other data, or such as do not vary.
    """
    x, y = examples(objective)
    if not x.is_floating_point() or x.ndim < 2:
        raise InputError(
            f"this takes inputs as numbers, floating-point of shape (N, ...); got {x.dtype} of {tuple(x.shape)}. Token "
            "numbers have no linear model: give a task whose inputs are measured."
        )
    drawn, notes = torch.Generator().manual_seed(seed), list[str]()
    x = x[order := torch.randperm(len(x), generator=drawn)].double().flatten(1)
    y = _numbers(y[order])
    if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
        raise InputError("inputs and targets must be finite; there are NaN or infinite numbers among them.")
    spread = x.std(0, correction=0)
    vary = spread > _LEAST * float(spread.max())
    if len(x) < 2 or int(vary.sum()) < 2:
        raise InputError(f"at least two inputs must vary over the examples; {int(vary.sum())} of {x.shape[1]} do.")
    chosen = spread.masked_fill(~vary, 0.0).topk(min(inputs, int(vary.sum()))).indices.sort().values
    if len(chosen) < x.shape[1]:
        notes.append(f"{len(chosen)} of {x.shape[1]} inputs were taken: those that vary most over the examples.")
    x = (x[:, chosen] - x[:, chosen].mean(0)) / spread[chosen]
    N, d = x.shape
    U, s, _ = torch.linalg.svd(x, full_matrices=False)
    correlation = (y - y.mean(0)).T @ U[:, s > _LEAST * s[0]]
    largest = float(torch.linalg.matrix_norm(correlation, 2)) if correlation.numel() else 0.0
    if not largest > _LEAST * float((y - y.mean(0)).norm()):
        raise InputError(
            "the targets do not vary with the inputs, so that there is nothing for a linear model to learn."
        )
    wanted = max(1, d // 2) if wanted is None else wanted
    X = _independent(x, min(wanted, d))
    if len(X) < wanted:
        notes.append(f"{len(X)} examples were taken of the {wanted} wanted: no more are independent of each other.")
    matrix = _low_rank(x[: min(N, d)], rank)
    weights = torch.zeros(d, dtype=torch.float64)
    weights[torch.randperm(d, generator=drawn)[: min(teacher, d // 2)]] = 1.0
    unseen = min(max(1, round(hidden * matrix.numel())), matrix.numel() - 1)
    observed = torch.ones(matrix.numel(), dtype=torch.bool)
    observed[torch.randperm(matrix.numel(), generator=drawn)[:unseen]] = False
    return LinearData(
        X=X,
        teacher=weights,
        correlation=correlation / largest,
        matrix=matrix,
        observed=observed.view(matrix.shape),
        notes=tuple(notes),
    )


def _numbers(y: Tensor) -> Tensor:
    """Return targets (N, k): class numbers as one-hot rows of the classes there are, others as they are."""
    if y.is_complex():
        raise InputError(f"targets must be real numbers or class numbers, got {y.dtype}.")
    if y.is_floating_point():
        return y.double().flatten(1) if y.ndim > 1 else y.double()[:, None]
    if y.ndim != 1:
        return y.double().flatten(1)
    _, places = y.unique(return_inverse=True)
    return F.one_hot(places).double()


def _low_rank(X: Tensor, rank: int) -> Tensor:
    U, s, Vt = torch.linalg.svd(X, full_matrices=False)
    return (U[:, :rank] * (s[:rank] / s[0])) @ Vt[:rank]


def _independent(X: Tensor, count: int) -> Tensor:
    """Return the first rows, so many at most, of which none depends on those before."""
    kept, basis = list[Tensor](), X.new_zeros(0, X.shape[1])
    for row in X:
        if len(kept) == count:
            break
        left = row
        for _ in range(2):
            left = left - (basis @ left) @ basis
        if float(left.norm()) > 1e-3 * float(row.norm()) > 0:
            kept.append(row)
            basis = torch.cat([basis, (left / left.norm())[None]])
    return torch.stack(kept)
