"""AdaHessian: Adam with the curvature of each parameter in place of its squared gradient.

Reference: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney (2021), AdaHessian: an adaptive second order optimizer for
machine learning, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.diagonal.corrections import bias_corrections, scalar_lr, step_sizes
from optimizers.diagonal.curvature_source import CurvatureSource, curvature_source
from optimizers.diagonal.shell import CurvatureOptimizer
from optimizers.diagonal.spatial_average import RULES, spatial_average, spatial_averages
from optimizers.shared.validate import check_at_least, check_betas, check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    How to take steps, micro-batches, clipping, data parallelism, scalers: see
    `optimizers.diagonal.shell.CurvatureOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and of squared curvature.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        hessian_power: k, how much of the curvature to divide by: 1 all, 0 none (momentum).
        spatial_average: rule of `optimizers.diagonal.spatial_average`: "paper" averages convolution kernels, an integer
        b also
            blocks of b in the rows of matrices, None nothing.
        absolute: "after" averages signed entries, the paper's formula; "before" averages magnitudes, as the authors'
            code does.
        stale: between refreshes, "keep" leaves V alone; "repeat" counts the last D again on every step.
        bias_correction: n counts "refreshes" of V, or all "steps", which makes steps too long where V is refreshed
            rarely.
        curvature: "hessian-diagonal", "row-norm", "gauss-newton-bartlett" (or "fisher"), "empirical-fisher" or a
            `CurvatureSource`.
        num_probes: products or samples averaged for each D. One probe may cancel in an entry, whose first steps are
            then up to lr m / eps long: more probes, or a warm-up of lr, prevent that.
        update_first, update_every, loss, process_group, check_finite, foreach, maximize, capturable, seed: as in
            `CurvatureOptimizer`.

    Raises:
        InputError: for settings out of range.

    Public implementations differ from the paper in the settings of `PRESETS`, and `AdaHessian.like(name, params)` takes
    them over: "official" (the authors' image code: magnitudes are averaged), "davda54" (no spatial average, eps 1e-8,
    stale curvature counted again), "torch_optimizer" (power 1/2), "kozistr" (no average, eps 1e-16, correction by all
    steps). Their defects (leaks, biased probes on several ranks, curvature lost from the state) are not taken over.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = AdaHessian([w], lr=1.0, betas=(0.0, 0.0), eps=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([1.0, 100.0]) * w**2).sum())  # Newton's step: H is diagonal
        >>> w.tolist()
        [0.0, 0.0]
    """

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
        update_first: int = 1,
        update_every: int = 1,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "spatial_average": spatial_average,
            "absolute": absolute,
            "stale": stale,
            "bias_correction": bias_correction,
            "update_first": update_first,
            "update_every": update_every,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "seed": seed,
        }
        source = curvature_source(curvature, num_probes)
        super().__init__(
            params, defaults, curvature=source, loss=loss, process_group=process_group, check_finite=check_finite
        )

    @classmethod
    def like(cls, implementation: str, params: Any, **settings: Any) -> AdaHessian:
        """Return the optimizer with the settings of a public implementation; `settings` override them.

        Raises:
            InputError: if there is no preset of that name.
        """
        check_choice("implementation", implementation, PRESETS)
        return cls(params, **{**PRESETS[implementation], **settings})

    def _averages(self, group: dict[str, Any]) -> tuple[str, ...]:
        last = ("hessian_diag",) if group["stale"] == "repeat" else ()
        return ("exp_avg", "exp_hessian_diag_sq", *last)

    def _validate(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        for name in ("eps", "weight_decay", "hessian_power"):
            check_at_least(name, group[name], 0.0)
        check_choice("absolute", group["absolute"], ("after", "before"))
        check_choice("stale", group["stale"], ("keep", "repeat"))
        check_choice("bias_correction", group["bias_correction"], ("refreshes", "steps"))
        rule = group["spatial_average"]
        if isinstance(rule, str) and rule not in RULES:
            raise InputError(f"spatial_average must be one of {', '.join(RULES)}, an integer or None, got {rule!r}.")
        for p in group["params"]:
            spatial_average(torch.empty(p.shape, device="meta"), rule)  # shapes that a rule does not cover

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        curvatures: list[Tensor] | None,
        states: list[dict[str, Tensor]],
    ) -> None:
        if curvatures is not None:
            if group["absolute"] == "before":
                curvatures = list(torch._foreach_abs(curvatures))
            curvatures = spatial_averages(curvatures, group["spatial_average"])
        if group["stale"] == "repeat":
            if curvatures is not None:
                torch._foreach_copy_([state["hessian_diag"] for state in states], curvatures)
            curvatures = [state["hessian_diag"] for state in states]
        capturable = group["capturable"]
        beta1, beta2 = group["betas"]
        every_step = group["bias_correction"] == "steps" or group["stale"] == "repeat"
        corrections1 = bias_corrections(states, "step", beta1, capturable=capturable)
        corrections2 = bias_corrections(states, "step" if every_step else "hessian_step", beta2, capturable=capturable)
        lr = scalar_lr(group)
        update = _single_tensor_adahessian if group["foreach"] is False else _multi_tensor_adahessian
        update(
            params,
            grads,
            curvatures,
            [state["exp_avg"] for state in states],
            [state["exp_hessian_diag_sq"] for state in states],
            [c**0.5 for c in corrections2],
            step_sizes(lr, corrections1, states, capturable=capturable),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            shrinkage=1 - lr * group["weight_decay"] if group["weight_decay"] != 0 else None,
            power=group["hessian_power"],
        )


def _single_tensor_adahessian(
    params: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_hessian_diag_sqs: list[Tensor],
    root_corrections: list[Any],
    sizes: list[Any],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    shrinkage: Any,
    power: float,
) -> None:
    """Update one tensor after the other: the reference."""
    for i, p in enumerate(params):
        m, V = exp_avgs[i], exp_hessian_diag_sqs[i]
        m.lerp_(grads[i], 1 - beta1)
        if curvatures is not None:
            V.mul_(beta2).addcmul_(curvatures[i], curvatures[i], value=1 - beta2)
        denominator = (V.sqrt() / root_corrections[i]).pow(power) + eps
        if shrinkage is not None:
            p.mul_(shrinkage)
        p.sub_(m / denominator * sizes[i])


def _multi_tensor_adahessian(
    params: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_hessian_diag_sqs: list[Tensor],
    root_corrections: list[Any],
    sizes: list[Any],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    shrinkage: Any,
    power: float,
) -> None:
    """Update lists of tensors at once."""
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    if curvatures is not None:
        torch._foreach_mul_(exp_hessian_diag_sqs, beta2)
        torch._foreach_addcmul_(exp_hessian_diag_sqs, curvatures, curvatures, 1 - beta2)
    steps = list(torch._foreach_sqrt(exp_hessian_diag_sqs))
    torch._foreach_div_(steps, root_corrections)
    if power != 1:
        torch._foreach_pow_(steps, power)
    torch._foreach_add_(steps, eps)
    if shrinkage is not None:
        torch._foreach_mul_(params, shrinkage)
    if isinstance(sizes[0], float):
        torch._foreach_addcdiv_(params, exp_avgs, steps, [-size for size in sizes])
        return
    torch._foreach_reciprocal_(steps)  # sizes are tensors: nothing may wait for them
    torch._foreach_mul_(steps, exp_avgs)
    torch._foreach_mul_(steps, sizes)
    torch._foreach_sub_(params, steps)
