"""Equilibrated SGD: every parameter is scaled by the norm of its row of the Hessian.

Reference: Dauphin, de Vries and Bengio (2015), Equilibrated adaptive learning rates for non-convex optimization,
Algorithm 1. The defaults of damping and update_every are those of the authors' code
(https://gist.github.com/ynd/f1ce7133a03ec54d6eb9), which has a momentum besides; that of lr is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optimizers.diagonal.curvature_source import RowNorm
from optimizers.diagonal.shell import CurvatureOptimizer, State, Tensors
from optimizers.shared.base import Group, Shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ESGD"]


class ESGD(CurvatureOptimizer):
    """Gradient descent with the equilibration preconditioner, of indefinite Hessians too.

    With n the number of refreshes so far, one on every `update_every`-th step, and z random:

        D <- D + (H z)^2                                     E[(H z)_i^2] = sum_j H_ij^2
        theta <- theta - lr g / (sqrt(D / n) + damping) - lr weight_decay theta

    All refreshes count alike, as in the paper, so that the scale settles; the paper draws z from a normal distribution,
    here they are random signs, whose squares have the same expectation and less variance. The first refresh averages at
    least 10 probes: one alone may cancel, (H z)_i = 0, and divide up to `update_every` steps by the damping.

    With exact row norms the rows of sqrt(D / n)^-1 H have length 1 and its eigenvalues are at most sqrt(number of
    parameters): lr below 2 over that root never diverges on a quadratic; sparse and clustered Hessians allow far more.

    Cost: a Hessian product more than a gradient on steps with curvature, 10 on the first. Memory: one sum.

    How to take steps, micro-batches, clipping, data parallelism, scalers: see `CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        damping: added to the row norms.
        weight_decay: decoupled, times lr.
        num_probes: products averaged for each refresh after the first.
        update_every: steps between measurements of curvature.
        shared: loss, process_group, maximize, seed, check_finite, update_first, foreach, capturable: see `Shared`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = ESGD([w], lr=0.5, damping=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([1.0, 100.0]) * w**2).sum())
        >>> w.tolist()
        [1.5, -1.0]
    """

    _averages = ("sum_row_norm_sq",)
    _least: ClassVar[dict[str, float]] = {"damping": 0.0, "weight_decay": 0.0}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.03,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        num_probes: int = 1,
        update_every: int = 20,
        **shared: Unpack[Shared],
    ) -> None:
        defaults: Group = {"lr": lr, "damping": damping, "weight_decay": weight_decay, "update_every": update_every}
        super().__init__(params, defaults, RowNorm(num_probes), **shared)

    def _update(self, group: Group, params: Tensors, grads: Tensors, curvatures: Tensors | None, state: State) -> None:
        lr, damping, sums = group["lr"], group["damping"], state["sum_row_norm_sq"]
        counts: list[Any] = state["hessian_step"] if group["capturable"] else [float(n) for n in state["hessian_step"]]
        sizes: list[Any] = [lr * (n > 0) for n in counts]  # without curvature: wait
        counts = [n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1.0) for n in counts]
        if group["foreach"] is False:
            for i, p in enumerate(params):
                if curvatures is not None:
                    sums[i].addcmul_(curvatures[i], curvatures[i])
                p.sub_(grads[i] / ((sums[i] / counts[i]).sqrt() + damping) * sizes[i])
            return
        if curvatures is not None:
            torch._foreach_addcmul_(sums, curvatures, curvatures)
        steps = list(torch._foreach_div(sums, counts))
        torch._foreach_sqrt_(steps)
        torch._foreach_add_(steps, damping)
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, grads)
        torch._foreach_mul_(steps, sizes)
        torch._foreach_sub_(params, steps)
