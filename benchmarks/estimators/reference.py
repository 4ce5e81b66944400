"""Exact diagonals and outer eigenvalues, by plain double backward that shares no code with the engine."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.tasks.load import load_task
from benchmarks.common.peers import Operator, by_hand, flatten
from benchmarks.common.problems import Problem
from benchmarks.common.trained import cache

__all__ = ["ESTIMATED", "exact_diagonal", "make_estimated", "outer_eigenvalues"]

ESTIMATED = {"digits-mlp": None, "digits-cnn": 256}
"""The bundled tasks, and of how many of the training images the Hessian is; None is all."""


def make_estimated(name: str, *, dtype: torch.dtype = torch.float32) -> Problem:
    """Return the named problem: the bundled model in eval mode and its images."""
    task = load_task(name)
    inputs, targets = (t[: ESTIMATED[name]] for t in task.train_data)
    return Problem(name, task.model.eval().to(dtype), nn.CrossEntropyLoss(), inputs.to(dtype), targets)


def exact_diagonal(problem: Problem) -> Tensor:
    """Return the diagonal of the Hessian in float64, from the cache if it is there.

    One backward pass an entry, of the gradient with respect to its own tensor alone: three minutes for digits-cnn.
    """
    path = cache() / f"{problem.name}-diagonal-{_fingerprint(problem)}.pt"
    if not path.exists():
        required = [p.requires_grad for p in problem.params]
        parts = [_diagonal_of(problem, p) for p in problem.params]
        for p, flag in zip(problem.params, required, strict=True):
            p.requires_grad_(flag)
        torch.save(torch.cat(parts), path)
    diagonal: Tensor = torch.load(path, weights_only=True)
    return diagonal


def _diagonal_of(problem: Problem, chosen: nn.Parameter) -> Tensor:
    for p in problem.params:
        p.requires_grad_(p is chosen)
    gradient = torch.autograd.grad(problem.evaluate(), chosen, create_graph=True)[0].reshape(-1)
    entries = torch.empty(len(gradient), dtype=torch.float64)
    for i in range(len(gradient)):  # by index: the backward pass of an iteration over all entries visits all of them
        (row,) = torch.autograd.grad(gradient[i], chosen, retain_graph=True)
        entries[i] = row.reshape(-1)[i]
    return entries


def outer_eigenvalues(problem: Problem, operator: Operator, k: int) -> Tensor:
    """Return the k eigenvalues largest in magnitude, in that order, by ARPACK to a tolerance of 1e-8; cached."""
    path = cache() / f"{problem.name}-{operator}-{k}-{_fingerprint(problem)}.pt"
    if not path.exists():
        from scipy.sparse.linalg import LinearOperator, eigsh

        product, n = by_hand(problem, operator), problem.num_params

        def matvec(x: Any) -> Any:
            return product(torch.as_tensor(np.ascontiguousarray(x)).reshape(-1)).numpy()

        A = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)
        values = torch.tensor(eigsh(A, k, tol=1e-8, v0=start, return_eigenvectors=False))
        torch.save(values[values.abs().argsort(descending=True)], path)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def _fingerprint(problem: Problem) -> str:
    numbers = [flatten(tuple(problem.params)).detach(), problem.inputs, problem.targets]
    return hashlib.sha256(b"".join(np.ascontiguousarray(t.numpy()).tobytes() for t in numbers)).hexdigest()[:12]
