"""Sophia: momentum divided by curvature, each entry of the step clipped.

Reference: Liu, Li, Hall, Liang and Ma (2024), Sophia: a scalable stochastic second-order optimizer for language model
pre-training, Algorithm 3, with the estimators of Algorithms 1 (Hutchinson) and 2 (Gauss-Newton-Bartlett). The defaults
of betas, eps and update_every are the paper's; that of weight_decay is the authors' code's
(https://github.com/Liuhong99/Sophia), which takes 0.965 for the first beta and, in its class for Hutchinson estimates,
corrects the average of gradients for its start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.diagonal.curvature_source import CurvatureSource, curvature_source
from optimizers.diagonal.shell import CurvatureOptimizer, State, Tensors
from optimizers.shared.base import Group, Shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sophia"]


class Sophia(CurvatureOptimizer):
    """Clipped steps scaled by a running average of the curvature's diagonal.

    With g the gradient and h^ a diagonal estimate, signed (Hutchinson) or never negative (Gauss-Newton-Bartlett):

        m = beta1 m + (1 - beta1) g                          on every step
        h = beta2 h + (1 - beta2) h^                         on every `update_every`-th
        theta <- theta - lr weight_decay theta
        theta <- theta - lr clip(m / max(gamma h, eps), 1)

    Neither average is corrected for its start at zero, as in the paper: early steps are clipped ones. Where h is not
    positive, or small beside m, an entry moves by lr, as in sign descent; `clipped_share` tells how often.

    Cost: as AdaHessian on a step with curvature from Hessian products, 2 gradients with Gauss-Newton-Bartlett; 1
    gradient on the others. Memory: two averages.

    How to take steps, micro-batches, clipping, data parallelism, scalers: see `CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate, the largest move of an entry.
        betas: decay of the averages of gradients and of curvature.
        gamma: share of the curvature to divide by; the paper takes 0.01 with Hutchinson's estimates and 0.05 with
            Gauss-Newton-Bartlett. Larger values clip less.
        eps: least denominator, positive.
        weight_decay: decoupled, times lr.
        curvature: "gauss-newton-bartlett", also called "fisher", or "empirical-fisher" (closures return (outputs,
            targets), `loss=` is needed), "hessian-diagonal", "row-norm" or a `CurvatureSource`.
        denominator: "max" is the paper's max(gamma h, eps); "add" the authors' code, gamma max(h, 0) + eps, where rho
            is this gamma and the batch size, its bs, is part of the estimate here.
        num_probes: products or samples averaged for each estimate.
        update_every: steps between measurements of curvature.
        shared: loss, process_group, maximize, seed, check_finite, update_first, foreach, capturable: see `Shared`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = Sophia([w], lr=0.5, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0, curvature="row-norm")
        >>> loss = optimizer.step(lambda: w[0] ** 2 / 2 - w[1] ** 2 / 2)  # half a Newton step; away from the maximum
        >>> w.tolist()
        [0.5, 1.5]
    """

    _averages = ("exp_avg", "exp_hessian_diag")
    _least: ClassVar[dict[str, float]] = {"gamma": 0.0, "eps": torch.finfo(torch.float32).tiny, "weight_decay": 0.0}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"denominator": ("max", "add")}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        curvature: str | CurvatureSource = "gauss-newton-bartlett",
        denominator: Literal["max", "add"] = "max",
        num_probes: int = 1,
        update_every: int = 10,
        **shared: Unpack[Shared],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"denominator": denominator, "update_every": update_every}
        super().__init__(params, defaults, curvature_source(curvature, num_probes), **shared)

    def clipped_share(self) -> Tensor:
        """Return the share of entries that the present averages would clip, (). The paper aims at 0.5 to 0.9."""
        clipped, total = [], 0
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                m, h = state["exp_avg"], state["exp_hessian_diag"]
                clipped.append((m.abs() >= _denominator(h, group)).sum())
                total += m.numel()
        return torch.stack([c.to(clipped[0].device) for c in clipped]).sum() / total if total else torch.tensor(0.0)

    def _update(self, group: Group, params: Tensors, grads: Tensors, curvatures: Tensors | None, state: State) -> None:
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        ms, hs = state["exp_avg"], state["exp_hessian_diag"]
        if group["foreach"] is False:
            for i, p in enumerate(params):
                ms[i].lerp_(grads[i], 1 - beta1)
                if curvatures is not None:
                    hs[i].lerp_(curvatures[i], 1 - beta2)
                p.sub_((ms[i] / _denominator(hs[i], group)).clamp(-1, 1) * lr)
            return
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        if curvatures is not None:
            torch._foreach_lerp_(hs, curvatures, 1 - beta2)
        steps = list(torch._foreach_mul(hs, group["gamma"]))
        if group["denominator"] == "max":
            torch._foreach_clamp_min_(steps, eps)
        else:
            torch._foreach_clamp_min_(steps, 0.0)
            torch._foreach_add_(steps, eps)
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, ms)
        torch._foreach_clamp_max_(steps, 1.0)
        torch._foreach_clamp_min_(steps, -1.0)
        torch._foreach_mul_(steps, lr)
        torch._foreach_sub_(params, steps)


def _denominator(h: Tensor, group: Group) -> Tensor:
    if group["denominator"] == "max":
        return (group["gamma"] * h).clamp_min(group["eps"])
    return group["gamma"] * h.clamp_min(0) + group["eps"]
