"""AdaHessian: Adam with the curvature of each parameter in place of its squared gradient.

Reference: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney (2021), AdaHessian: an adaptive second order optimizer for
machine learning, Algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.diagonal.corrections import bias_corrections, step_sizes
from optimizers.diagonal.curvature_source import CurvatureSource, curvature_source
from optimizers.diagonal.shell import CurvatureOptimizer, State, Tensors
from optimizers.diagonal.spatial_average import RULES, spatial_average
from optimizers.shared.base import Group, Shared, check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PRESETS", "AdaHessian"]

PRESETS: dict[str, dict[str, Any]] = {
    "official": {"absolute": "before", "spatial_average": "official"},
    "davda54": {"lr": 0.1, "eps": 1e-8, "spatial_average": "davda54", "stale": "repeat"},
    "torch_optimizer": {"hessian_power": 0.5, "absolute": "before", "spatial_average": "torch_optimizer"},
    "kozistr": {"lr": 0.1, "eps": 1e-16, "spatial_average": "kozistr", "bias_correction": "steps"},
}


class AdaHessian(CurvatureOptimizer):
    """Adaptive steps scaled by a running average of squared curvature.

    With g the gradient, z random signs, H z a Hessian product through the graph of g, and s(.) the spatial average:

        D = s(z * (H z))                                     on every `update_every`-th step, n of them so far
        m = beta1 m + (1 - beta1) g                          V = beta2 V + (1 - beta2) D * D
        theta <- theta - lr (m / (1 - beta1^t)) / ((V / (1 - beta2^n))^(k/2) + eps) - lr weight_decay theta

    What V estimates: with one probe, (H z)_i^2 has the expectation sum_j H_ij^2, the squared norm of row i, not H_ii^2;
    they agree for a diagonal H. More probes, and the average over convolution kernels, move V towards H_ii^2.
    `curvature="row-norm"` estimates the row norm on purpose. Without second derivatives, from closures that return
    (outputs, targets) and with `loss=`: `"gauss-newton-bartlett"`, also called `"fisher"`, estimates the diagonal of
    the Gauss-Newton matrix, `"empirical-fisher"` the mean of the examples' squared gradients.

    Cost: a forward pass, a backward pass that keeps a graph and a product through it: about 3 gradients on a step with
    curvature, 1 on the others. Memory: two averages, and on steps with curvature the graph of the gradient.

    How to take steps, micro-batches, clipping, data parallelism, scalers: see `CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and of squared curvature.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        hessian_power: k, how much of the curvature to divide by: 1 all, 0 none (momentum).
        spatial_average: rule of `optimizers.diagonal.spatial_average`: "paper" averages convolution kernels, an integer
            b also blocks of b in the rows of matrices, None nothing.
        absolute: "after" averages signed entries, the paper's formula; "before" averages magnitudes, as the authors'
            code does.
        stale: between refreshes, "keep" leaves V alone; "repeat" counts the last D again on every step.
        bias_correction: n counts "refreshes" of V, or all "steps", which makes steps too long where V is refreshed
            rarely.
        curvature: "hessian-diagonal", "row-norm", "gauss-newton-bartlett" (or "fisher"), "empirical-fisher" or a
            `CurvatureSource`.
        num_probes: products or samples averaged for each D. One probe may cancel in an entry, whose first steps are
            then up to lr m / eps long: more probes, or a warm-up of lr, prevent that.
        update_every: steps between measurements of curvature.
        shared: loss, process_group, maximize, seed, check_finite, update_first, foreach, capturable: see `Shared`.

    Raises:
        InputError: for settings out of range.

    Public implementations differ from the paper in the settings of `PRESETS`, and `AdaHessian.like(name, params)` takes
    them over: "official" (the authors' image code: magnitudes are averaged), "davda54" (no spatial average, eps 1e-8,
    stale curvature counted again), "torch_optimizer" (power 1/2), "kozistr" (no average, eps 1e-16, correction by all
    steps). Their defects (leaks, biased probes on several ranks, curvature lost from the state) are not taken over.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = AdaHessian([w], lr=1.0, betas=(0.0, 0.0), eps=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([1.0, 100.0]) * w**2).sum())  # Newton's step: H is diagonal
        >>> w.tolist()
        [0.0, 0.0]
    """

    _averages = ("exp_avg", "exp_hessian_diag_sq")
    _least: ClassVar[dict[str, float]] = {"eps": 0.0, "weight_decay": 0.0, "hessian_power": 0.0}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "absolute": ("after", "before"),
        "stale": ("keep", "repeat"),
        "bias_correction": ("refreshes", "steps"),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        spatial_average: str | int | None = "paper",
        absolute: Literal["after", "before"] = "after",
        stale: Literal["keep", "repeat"] = "keep",
        bias_correction: Literal["refreshes", "steps"] = "refreshes",
        curvature: str | CurvatureSource = "hessian-diagonal",
        num_probes: int = 1,
        update_every: int = 1,
        **shared: Unpack[Shared],
    ) -> None:
        defaults: Group = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
        }
        defaults |= {"spatial_average": spatial_average, "absolute": absolute, "stale": stale}
        defaults |= {"bias_correction": bias_correction, "update_every": update_every}
        super().__init__(params, defaults, curvature_source(curvature, num_probes), **shared)

    @classmethod
    def like(cls, implementation: str, params: Any, **settings: Any) -> AdaHessian:
        """Return the optimizer with the settings of a public implementation; `settings` override them.

        Raises:
            InputError: if there is no preset of that name.
        """
        check_choice("implementation", implementation, PRESETS)
        return cls(params, **{**PRESETS[implementation], **settings})

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        state = super()._new_state(p, group)
        return state | {"hessian_diag": torch.zeros_like(state["exp_avg"])} if group["stale"] == "repeat" else state

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        rule = group["spatial_average"]
        if isinstance(rule, str) and rule not in RULES:
            raise InputError(f"spatial_average must be one of {', '.join(RULES)}, an integer or None, got {rule!r}.")
        for p in group["params"]:
            spatial_average(torch.empty(p.shape, device="meta"), rule)  # shapes that a rule does not cover

    def _update(self, group: Group, params: Tensors, grads: Tensors, curvatures: Tensors | None, state: State) -> None:
        repeats, power, eps = group["stale"] == "repeat", group["hessian_power"], group["eps"]
        if curvatures is not None:
            if group["absolute"] == "before":
                curvatures = list(torch._foreach_abs(curvatures))
            curvatures = [D if D.ndim < 2 else spatial_average(D, group["spatial_average"]) for D in curvatures]
        if repeats:
            if curvatures is not None:
                torch._foreach_copy_(state["hessian_diag"], curvatures)
            curvatures = state["hessian_diag"]
        beta1, beta2 = group["betas"]
        counter = "step" if group["bias_correction"] == "steps" or repeats else "hessian_step"
        roots = [c**0.5 for c in bias_corrections(state[counter], beta2, group)]
        sizes = step_sizes(group, state, beta1)
        ms, Vs = state["exp_avg"], state["exp_hessian_diag_sq"]
        if group["foreach"] is False:
            for i, p in enumerate(params):
                ms[i].lerp_(grads[i], 1 - beta1)
                if curvatures is not None:
                    Vs[i].mul_(beta2).addcmul_(curvatures[i], curvatures[i], value=1 - beta2)
                p.sub_(ms[i] / ((Vs[i].sqrt() / roots[i]).pow(power) + eps) * sizes[i])
            return
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        if curvatures is not None:
            torch._foreach_mul_(Vs, beta2)
            torch._foreach_addcmul_(Vs, curvatures, curvatures, 1 - beta2)
        steps = list(torch._foreach_sqrt(Vs))
        if power == 1 and isinstance(sizes[0], float):  # the fraction extended by the root: one pass less
            torch._foreach_add_(steps, [eps * root for root in roots])
            torch._foreach_addcdiv_(params, ms, steps, [-size * root for size, root in zip(sizes, roots, strict=True)])
            return
        torch._foreach_div_(steps, roots)
        if power != 1:
            torch._foreach_pow_(steps, power)
        torch._foreach_add_(steps, eps)
        if isinstance(sizes[0], float):
            torch._foreach_addcdiv_(params, ms, steps, [-size for size in sizes])
            return
        torch._foreach_reciprocal_(steps)  # sizes are tensors: nothing may wait for them
        torch._foreach_mul_(steps, ms)
        torch._foreach_mul_(steps, sizes)
        torch._foreach_sub_(params, steps)
