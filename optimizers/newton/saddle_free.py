"""Newton's method with the absolute values of eigenvalues, in a Krylov space: saddles repel instead of attracting.

Reference: Dauphin, Pascanu, Gulcehre, Cho, Ganguli and Bengio (2014), Identifying and attacking the saddle point
problem in high-dimensional non-convex optimization, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature.linalg.krylov.lanczos import lanczos
from optimizers.newton.damping import DampingRule, reduction_ratio
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.shared.validate import check_at_least, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SaddleFreeNewton"]


class SaddleFreeNewton(FullBatchOptimizer):
    """Steps d = -V (|T| + lambda I)^-1 V'g, V a Lanczos basis from the gradient and T the Hessian within it.

    |T| has T's eigenvectors and the magnitudes of its eigenvalues. g lies in the basis, so that no part of it is lost.
    Within a step lambda rises, at no product, until the loss falls by a share of what the model with |T| promises;
    afterwards it falls where that was good.

    Cost of a step: a gradient with graph, `num_steps` products, a loss for each lambda tried. Memory: the basis.

    Args:
        params: parameters or groups of them.
        lr: factor on the step.
        num_steps: size of the Lanczos basis.
        damping: lambda at first; units of the Hessian.
        damping_rule: maps (lambda, ratio) to the next lambda.
        max_trials: values of lambda that one step tries.
        loss: `loss(outputs, targets)`, where closures return both.
        process_group: ranks that hold parts of each batch, and count by their loss terms if closures return outputs.
        maximize, seed: as in `FullBatchOptimizer`; the method draws no random numbers.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1e-3]))  # beside the saddle of x^2 - y^2 + y^4
        >>> optimizer = SaddleFreeNewton([w])
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
        >>> round(float(loss), 4)
        -0.25
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule")
    _adapted = ("damping",)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        num_steps: int = 20,
        damping: float = 1e-2,
        damping_rule: Callable[[float, float], float] = DampingRule(increase=4.0, decrease=0.25, minimum=1e-12),  # noqa: B008
        max_trials: int = 40,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        self.damping_rule = damping_rule
        defaults = {
            "lr": lr,
            "basis_size": num_steps,
            "damping": damping,
            "max_trials": max_trials,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, kind="hessian", loss=loss, process_group=process_group)

    def _validate(self, group: dict[str, Any]) -> None:
        check_at_least("num_steps", group["basis_size"], 1)
        check_at_least("max_trials", group["max_trials"], 1)
        check_positive("damping", group["damping"])

    def _move(self, evaluations: Evaluations, here: Linearised, start: Tensor) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        krylov = lanczos(here.operator, here.gradient, num_steps=min(int(group["basis_size"]), flat.n))
        theta, S = torch.linalg.eigh(
            torch.diag(krylov.alpha) + torch.diag(krylov.beta, 1) + torch.diag(krylov.beta, -1)
        )
        sizes, c = theta.abs(), S[0] * torch.linalg.vector_norm(here.gradient)
        damping, eps, rates = float(group["damping"]), torch.finfo(flat.dtype).eps, self._rates(flat)
        negative = int((theta < -flat.n * eps * sizes.max()).sum())
        solver = f"basis of {len(theta)}" + (", invariant" if krylov.breakdown else "")
        solver += f", {negative} of negative curvature" if negative else ""
        message = "not tried"
        for trial in range(group["max_trials"]):
            y = -c / (sizes + damping)
            d = rates * (krylov.basis @ (S @ y))
            model = float(c.square() @ (1 / (sizes + damping) - sizes / (2 * (sizes + damping) ** 2)))
            loss = evaluations.value(start + d)
            ratio = reduction_ratio(here.loss, loss, model, eps)
            if ratio > 1e-4:
                group["damping"] = self.damping_rule(damping, ratio)
                return Move(
                    step=d,
                    loss=loss,
                    solver=solver,
                    message=f"accepted at the {trial + 1}. damping tried",
                    model_decrease=model,
                    ratio=ratio,
                )
            message = f"no damping up to {damping:.2g} lowers the loss"
            if float(torch.linalg.vector_norm(d)) <= eps * float(torch.linalg.vector_norm(start)):
                message += "; the step is below rounding of the parameters"
                break
            damping = max(self.damping_rule(damping, -math.inf), 1e-3 * float(sizes.max()))
        group["damping"] = damping
        return Move(step=None, loss=here.loss, solver=solver, message=message)
