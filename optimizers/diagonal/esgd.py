"""Equilibrated SGD: every parameter is scaled by the norm of its row of the Hessian.

Reference: Dauphin, de Vries and Bengio (2015), Equilibrated adaptive learning rates for non-convex optimization,
Algorithm 1. The defaults of damping and update_every are those of the authors' code
(https://gist.github.com/ynd/f1ce7133a03ec54d6eb9), which has a momentum besides; that of lr is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizers.diagonal.corrections import scalar_lr
from optimizers.diagonal.curvature_source import RowNorm
from optimizers.diagonal.shell import CurvatureOptimizer
from optimizers.shared.validate import check_at_least

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    How to take steps, micro-batches, clipping, data parallelism, scalers: see
    `optimizers.diagonal.shell.CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        damping: added to the row norms.
        weight_decay: decoupled, times lr.
        num_probes: products averaged for each refresh after the first.
        update_first, update_every, process_group, check_finite, foreach, maximize, capturable, seed: as in
            `CurvatureOptimizer`.
        loss: for closures that return (outputs, targets); optional here.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = ESGD([w], lr=0.5, damping=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([1.0, 100.0]) * w**2).sum())
        >>> w.tolist()
        [1.5, -1.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.03,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        num_probes: int = 1,
        update_first: int = 1,
        update_every: int = 20,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        check_finite: bool = True,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping": damping,
            "weight_decay": weight_decay,
            "update_first": update_first,
            "update_every": update_every,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "seed": seed,
        }
        source = RowNorm(num_probes)
        super().__init__(
            params, defaults, curvature=source, loss=loss, process_group=process_group, check_finite=check_finite
        )

    def _averages(self, group: dict[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        return ("sum_row_norm_sq",)

    def _validate(self, group: dict[str, Any]) -> None:
        for name in ("damping", "weight_decay"):
            check_at_least(name, group[name], 0.0)

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        curvatures: list[Tensor] | None,
        states: list[dict[str, Tensor]],
    ) -> None:
        lr = scalar_lr(group)
        sums = [state["sum_row_norm_sq"] for state in states]
        counts: list[Any]
        sizes: list[Any]
        if group["capturable"]:
            refreshes = [state["hessian_step"] for state in states]
            counts, sizes = [n.clamp_min(1) for n in refreshes], [lr * (n > 0) for n in refreshes]
        else:
            numbers = [float(state["hessian_step"]) for state in states]
            counts, sizes = [max(n, 1.0) for n in numbers], [lr * (n > 0) for n in numbers]  # without curvature: wait
        update = _single_tensor_esgd if group["foreach"] is False else _multi_tensor_esgd
        shrinkage = 1 - lr * group["weight_decay"] if group["weight_decay"] != 0 else None
        update(params, grads, curvatures, sums, counts, sizes, damping=group["damping"], shrinkage=shrinkage)


def _single_tensor_esgd(
    params: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor] | None,
    sums: list[Tensor],
    counts: list[Any],
    sizes: list[Any],
    *,
    damping: float,
    shrinkage: Any,
) -> None:
    """Update one tensor after the other: the reference."""
    for i, p in enumerate(params):
        if curvatures is not None:
            sums[i].addcmul_(curvatures[i], curvatures[i])
        if shrinkage is not None:
            p.mul_(shrinkage)
        p.sub_(grads[i] / ((sums[i] / counts[i]).sqrt() + damping) * sizes[i])


def _multi_tensor_esgd(
    params: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor] | None,
    sums: list[Tensor],
    counts: list[Any],
    sizes: list[Any],
    *,
    damping: float,
    shrinkage: Any,
) -> None:
    """Update lists of tensors at once."""
    if curvatures is not None:
        torch._foreach_addcmul_(sums, curvatures, curvatures)
    if shrinkage is not None:
        torch._foreach_mul_(params, shrinkage)
    steps = list(torch._foreach_div(sums, counts))
    torch._foreach_sqrt_(steps)
    torch._foreach_add_(steps, damping)
    torch._foreach_reciprocal_(steps)
    torch._foreach_mul_(steps, grads)
    torch._foreach_mul_(steps, sizes)
    torch._foreach_sub_(params, steps)
