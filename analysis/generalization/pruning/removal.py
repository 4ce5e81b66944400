"""What removing weights does: where the others go, what the quadratic model predicts of the loss, and what it becomes.

    L(w + d) - L(w)  ~  g'd + 1/2 d'H d.

The linear term is part of the prediction: away from a stationary point it may be the larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg import cg
from curvature.linop import LinearOperator, SymmetricOperator
from curvature.objective.objective import Objective
from curvature.objective.shift import shifted
from curvature.operators.hessian import HessianOperator
from curvature.results.estimates import Status, stderr_of_weighted_mean
from curvature.results.record import Result

__all__ = ["DiagonalMetric", "LiveProducts", "LossChanges", "Products", "held", "loss_changes", "true_changes"]


@dataclass(frozen=True)
class DiagonalMetric:
    """A diagonal matrix in the place of the Hessian: no weight moves but those removed."""

    values: Tensor
    """(n,)."""

    def displacement(self, w: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
        """Return the displacement (n,) that takes the pruned weights to zero, and 1/2 d'A d."""
        d = torch.where(pruned, -w, 0.0)
        return d, float((self.values.double() * d.double().square()).sum() / 2)


class _KeptBlock(SymmetricOperator):
    """The rows and columns of a symmetric operator that belong to kept weights."""

    def __init__(self, A: LinearOperator, kept: Tensor) -> None:
        super().__init__((len(kept), len(kept)), A.dtype, A.device)
        self.A, self.kept = A, kept

    def _matmat(self, X: Tensor) -> Tensor:
        whole = X.new_zeros(self.A.shape[0], X.shape[1])
        whole[self.kept] = X
        return (self.A @ whole)[self.kept]


@dataclass(frozen=True)
class Products:
    """Any positive semi-definite matrix known by its products: the best displacement by conjugate gradients."""

    A: Any
    """(n, n)."""
    damping: float
    """Added to the diagonal of the kept weights' block."""
    inverse: Any = None
    """(n, n), near (A + damping I)^-1: its kept block preconditions the system."""
    rtol: float = 1e-4
    """Tolerance of the residual."""
    max_iterations: int | None = None
    """Where to stop short of it; the displacement is then good, not the best. None solves to the tolerance."""

    def displacement(self, w: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
        """Return the best displacement d (n,) that takes the pruned weights to zero, and 1/2 d'A d.

        d_K = -(A_KK + damping I)^-1 A_KQ d_Q for the kept weights K, with d_Q = -w_Q.

        Raises:
            InputError: if the kept block is not positive definite, or the tolerance is out of reach.
        """
        d, kept = torch.where(pruned, -w, 0.0), (~pruned).nonzero()[:, 0]
        pull = (self.A @ d)[kept]
        if len(kept) and bool((pull != 0).any()):
            block = _KeptBlock(self.A, kept)
            near = None if self.inverse is None else _KeptBlock(self.inverse, kept)
            limits: dict[str, Any] = {"rtol": self.rtol, "max_iterations": self.max_iterations}
            found = cg(block, -pull, damping=self.damping, preconditioner=near, **limits)
            stopped = found.status is Status.MAX_ITERATIONS and self.max_iterations is not None
            if found.status is not Status.CONVERGED and not stopped:
                raise InputError(
                    f"the displacement of the kept weights was not found ({found.status.value}); raise the damping of "
                    f"{self.damping:.3g}, or take the Gauss-Newton matrix."
                )
            d[kept] = found.x
        return d, float(d.double() @ (self.A @ d).double() / 2)


@dataclass(frozen=True)
class LiveProducts(Products):
    """Products with a matrix of an objective, which are those at its present weights."""

    def displacement(self, w: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
        """Return what `Products` does.

        Raises:
            InputError: also if the model's weights are no longer `w`.
        """
        if not torch.equal(self.A.objective.space.current(), w):
            raise InputError(
                "the model's weights have changed since they were scored, and kfac-cg multiplies by the matrix of the "
                "present ones: score again, or put the weights back."
            )
        return super().displacement(w, pruned)


@dataclass(frozen=True, kw_only=True, repr=False)
class LossChanges(Result):
    """Changes of a loss along k displacements, predicted and true; units of the loss."""

    linear: Tensor
    """(k,), g'd."""
    curvature: Tensor
    """(k,), 1/2 d'H d, of the exact Hessian."""
    predicted_stderr: Tensor
    """(k,), one standard error of their sum over data of the same size; NaN with fewer than two batches."""
    true: Tensor
    """(k,), L(w + d) - L(w); infinite where the loss there overflows."""
    true_stderr: Tensor
    """(k,), likewise of the true change, from the differences batch by batch."""

    @property
    def predicted(self) -> Tensor:
        """(k,), g'd + 1/2 d'H d."""
        return self.linear + self.curvature


def loss_changes(objective: Objective, displacements: Tensor) -> LossChanges:
    """Return what the quadratic model predicts of the loss along displacements (n, k), and what becomes of it.

    Standard errors are from the spread over batches (`Objective.split` cuts them), of predictions and true changes
    alike: with shares p_b, stderr^2 = sum_b p_b^2 (x_b - x)^2 / (1 - p_b), that of a ratio of sums. The displacements
    count as given: where they were fitted to the same data, as a brain surgeon's, changes on other data are larger by
    more than that. Batches of a loader that shuffles are held in memory.

    Cost: a gradient, k Hessian products and k + 1 losses; up to twice that over a loader that shuffles.

    Raises:
        InputError: for displacements of another shape, and data on several ranks.
    """
    D = displacements
    if objective.process_group is not None:
        raise InputError("changes of the loss are measured in one process; give an objective without process_group.")
    if D.ndim != 2 or len(D) != objective.num_params:
        raise InputError(f"displacements must be of shape ({objective.num_params}, k), got {tuple(D.shape)}.")
    gradients: dict[int, Tensor] = {}
    objective.reduce(lambda lin: lin.gradient(), observe=lambda i, _, g: gradients.__setitem__(i, D.T @ g))
    curvature = _ByBatch()
    HessianOperator(objective).products([D], [None], observe=lambda i, w, Y: curvature.add(i, w, (D * Y[0]).sum(0) / 2))
    if objective.shuffles:  # a number of a batch is not of the same examples in each pass
        return loss_changes(held(objective), D)
    linear = _ByBatch({i: (w, gradients[i]) for i, (w, _) in curvature.found.items()})
    both = _ByBatch({i: (w, x + gradients[i]) for i, (w, x) in curvature.found.items()})
    total = len(curvature.found) if objective.is_sum else 1
    true, true_stderr = true_changes(objective, D)
    return LossChanges(
        linear=total * linear.mean,
        curvature=total * curvature.mean,
        predicted_stderr=total * both.stderr,
        true=true,
        true_stderr=true_stderr,
    )


def true_changes(objective: Objective, displacements: Tensor) -> tuple[Tensor, Tensor]:
    """Return L(w + d) - L(w) for the columns d of (n, k), and standard errors over the data. Cost: k + 1 losses."""
    here, there = objective.space.current(), objective.replace(keep_graphs=False)
    before = _losses(there, here)
    assert before is not None  # its gradient was finite
    after = [_losses(there, here + d) for d in displacements.T]
    if there.shuffles:
        return true_changes(held(objective), displacements)
    far = torch.tensor(math.inf, dtype=torch.float64, device=here.device)
    changes = _ByBatch(
        {
            i: (w, torch.stack([far if a is None else a.found[i][1] for a in after]) - x)
            for i, (w, x) in before.found.items()
        }
    )
    total = len(before.found) if objective.is_sum else 1
    return total * changes.mean, total * changes.stderr


def held(objective: Objective) -> Objective:
    """Return the objective on the batches of one pass over its data, held in memory."""
    return objective.replace(data=list(objective.replace(micro_batch=None).batches()))


class _ByBatch:
    """Numbers (k,) of every batch that counts, with its weight."""

    def __init__(self, found: dict[int, tuple[float, Tensor]] | None = None) -> None:
        self.found = {} if found is None else found

    def add(self, index: int, weight: float, value: Tensor) -> None:
        self.found[index] = (weight, value.double())

    @property
    def shares(self) -> Tensor:
        weights = torch.tensor([w for w, _ in self.found.values()], dtype=torch.float64)
        return weights / weights.sum()

    @property
    def mean(self) -> Tensor:
        return sum((p * x for p, (_, x) in zip(self.shares, self.found.values(), strict=True)), torch.zeros(()))

    @property
    def stderr(self) -> Tensor:
        return stderr_of_weighted_mean(torch.stack([x.double() for _, x in self.found.values()]), self.shares)


def _losses(objective: Objective, point: Tensor) -> _ByBatch | None:
    """Return the loss of every batch at a point; None where it overflows."""
    found = _ByBatch()
    try:
        with shifted(objective, point):
            objective.reduce(lambda lin: lin.loss, observe=found.add)
    except NonFiniteError:
        return None
    return found
