"""SASSHA: curvature and gradient measured where the loss is worst nearby, and the square root of the curvature.

Reference: Shin, Lee, Chung and Lee (2025), Sassha: sharpness-aware adaptive second-order optimization with stable
Hessian approximation (https://github.com/LOG-postech/Sassha); the perturbation is that of Foret, Kleiner, Mobahi and
Neyshabur (2021), Sharpness-aware minimization for efficiently improving generalization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.engine.repeated_evaluation import RepeatedEvaluation
from curvature.errors import InputError
from optimizers.diagonal.corrections import bias_corrections, step_sizes
from optimizers.diagonal.curvature_source import CurvatureSource, curvature_source
from optimizers.diagonal.shell import Closure, CurvatureOptimizer, State, Tensors
from optimizers.shared.base import Group, Shared
from optimizers.shared.closures import loss_of, own_gradients
from optimizers.shared.differentiation import gradients
from optimizers.shared.gradients import refuse_sparse
from optimizers.shared.ranks import average_over_ranks, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from typing_extensions import Unpack

__all__ = ["SASSHA"]


class SASSHA(CurvatureOptimizer):
    """Adaptive steps towards flat minima.

    With g the gradient at theta, and everything after the first line taken at theta + e:

        e = rho g / |g|
        m = beta1 m + (1 - beta1) g(theta + e)                on every step
        V = beta2 V + (1 - beta2) |z * (H z)|                 on every `update_every`-th, n of them so far
        theta <- theta - lr weight_decay theta
        theta <- theta - lr (m / (1 - beta1^t)) / ((V / (1 - beta2^n))^power + eps)

    The closure is evaluated twice a step, and steps need closures: `step(closure)` or `accumulate(closure)`. Each
    micro-batch is perturbed by its own gradient; ranks share one perturbation.

    Cost: one gradient more than AdaHessian. Memory: two averages and, within a step, a copy of the parameters.

    How to take steps, micro-batches, clipping, data parallelism, scalers: see `CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and of curvature.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        rho: length of the perturbation, over all parameters together, the same in all groups. The default is that of
            Foret et al.; the authors' class has 0 and leaves it to its user.
        hessian_power: of the curvature.
        bias_correction: n counts "refreshes" of V, as the average needs it, or all "steps", as the authors' code does,
            which makes early steps too long.
        curvature: "hessian-diagonal", "row-norm", "gauss-newton-bartlett" (or "fisher"), "empirical-fisher" or a
            `CurvatureSource`.
        num_probes: products or samples averaged for each estimate.
        update_every: steps between measurements of curvature.
        shared: loss, process_group, maximize, seed, check_finite, update_first, foreach, capturable: see `Shared`.

    Raises:
        InputError: for settings out of range, and for a loss in place of a closure.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SASSHA([w], lr=0.1, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, rho=5.0)
        >>> loss = optimizer.step(lambda: (w**2).sum() / 2)  # the gradient at w + (3, 4)
        >>> [round(x, 4) for x in w.tolist()]
        [2.4, 3.2]
    """

    _averages = ("exp_avg", "exp_hessian_diag")
    _least: ClassVar[dict[str, float]] = {"eps": 0.0, "weight_decay": 0.0, "rho": 0.0, "hessian_power": 0.0}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"bias_correction": ("refreshes", "steps")}
    _alike = (*CurvatureOptimizer._alike, "rho", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.05,
        hessian_power: float = 0.5,
        bias_correction: Literal["refreshes", "steps"] = "refreshes",
        curvature: str | CurvatureSource = "hessian-diagonal",
        num_probes: int = 1,
        update_every: int = 10,
        **shared: Unpack[Shared],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rho": rho}
        defaults |= {"hessian_power": hessian_power, "bias_correction": bias_correction, "update_every": update_every}
        super().__init__(params, defaults, curvature_source(curvature, num_probes), **shared)

    @on_all_ranks
    @torch.no_grad()
    def accumulate(self, closure: Closure | Tensor, **settings: Any) -> Tensor:
        """Add gradient and curvature at the perturbed point; see `CurvatureOptimizer.accumulate`.

        Returns:
            The loss at the unperturbed point, detached and without weight.
        """
        if isinstance(closure, Tensor):
            raise InputError("SASSHA evaluates the loss at two points: pass a closure, not the loss itself.")
        params = self._trained()
        repeated, kept = RepeatedEvaluation(params), False
        try:
            with repeated.watched():
                loss, step = self._perturbation(closure, repeated, params, settings)
                before = [p.clone() for p in params]
                try:
                    for p, e in zip(params, step, strict=True):
                        p.add_(e)
                    super().accumulate(lambda: repeated.call(closure, moves=False), **settings)
                finally:
                    torch._foreach_copy_(params, before)
            kept = True
        finally:
            repeated.finish(keep=kept)
        return loss

    def _perturbation(
        self, closure: Closure, repeated: RepeatedEvaluation, params: Tensors, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensors]:
        """Return the loss, detached, and rho g / |g|."""
        with torch.enable_grad():
            with own_gradients(params), self._no_wrapper_alone():
                returned = repeated.call(closure, moves=settings.get("part") != "curvature")
            loss, outputs, targets = loss_of(returned, self.loss)
            scaler: GradScaler | None = settings.get("scaler")
            scaled = loss if scaler is None else scaler.scale(loss)
        found = gradients(scaled, params, create_graph=False, retain_graph=False)
        refuse_sparse(found, type(self).__name__)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        if self.process_group is not None:
            share = share_of_rank(self, outputs, targets)
            grads = average_over_ranks(grads, self.process_group, share)
        group = self.param_groups[0]
        norms = [n.to(loss.device, torch.promote_types(n.dtype, torch.float32)) for n in torch._foreach_norm(grads)]
        length = group["rho"] / (torch.stack(norms).norm() + 1e-12) * (-1 if group["maximize"] else 1)
        return loss.detach(), [g * length.to(g.device) for g in grads]

    def _take_graphs_off_gradients(self) -> None:
        if self._sums is None and any(p.grad is not None and p.grad.requires_grad for p in self._curved()):
            for p in self._curved():
                p.grad = None if p.grad is None else p.grad.detach()
            raise InputError("SASSHA evaluates the loss at two points: call step(closure), not backward().")
        super()._take_graphs_off_gradients()

    def _update(self, group: Group, params: Tensors, grads: Tensors, curvatures: Tensors | None, state: State) -> None:
        (beta1, beta2), power, eps = group["betas"], group["hessian_power"], group["eps"]
        counter = "step" if group["bias_correction"] == "steps" else "hessian_step"
        corrections, sizes = bias_corrections(state[counter], beta2, group), step_sizes(group, state, beta1)
        ms, Vs = state["exp_avg"], state["exp_hessian_diag"]
        if group["foreach"] is False:
            for i, p in enumerate(params):
                ms[i].lerp_(grads[i], 1 - beta1)
                if curvatures is not None:
                    Vs[i].lerp_(curvatures[i].abs(), 1 - beta2)
                p.sub_(ms[i] / ((Vs[i] / corrections[i]).pow(power) + eps) * sizes[i])
            return
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        if curvatures is not None:
            torch._foreach_lerp_(Vs, torch._foreach_abs(curvatures), 1 - beta2)
        steps = list(torch._foreach_div(Vs, corrections))
        torch._foreach_pow_(steps, power)
        torch._foreach_add_(steps, eps)
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, ms)
        torch._foreach_mul_(steps, sizes)
        torch._foreach_sub_(params, steps)
