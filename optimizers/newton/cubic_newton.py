"""Newton's method with adaptive cubic regularisation (ARC).

Reference: Cartis, Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained optimization, part I,
algorithm 2.1; Nesterov and Polyak (2006), Cubic regularization of Newton method and its global performance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.gltr import cubic_subproblem
from optimizers.newton.damping import CubicRule, reduction_ratio
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.newton.trust_region_newton import check_forcing, forcing
from optimizers.shared.validate import check_at_least, check_choice, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CubicNewton"]


class CubicNewton(FullBatchOptimizer):
    """Steps that minimise g's + s'A s / 2 + sigma/3 |s|^3 in a Krylov space; sigma follows how well the model did.

    Within a step sigma rises, with gradient and graph kept, until the loss falls by enough. The cube bounds steps along
    negative curvature as a trust region does, by |s| = lambda / sigma, and needs no boundary.

    Cost of a step: a gradient with graph, and for each sigma tried a product an iteration and a loss.

    Args:
        params: parameters or groups of them.
        curvature: "hessian", for closures that return the loss; "ggn", for (outputs, targets) with `loss`.
        sigma: at first; units of the Hessian over those of the parameters.
        sigma_rule: maps (sigma, ratio) to the next sigma and holds the ratio from which a step is taken.
        escape: search directions that the gradient does not see, so that exact saddles are left.
        rtol: residual of the subproblem relative to |g|; "superlinear" takes min(1/10, |g|^(1/2)).
        max_iterations: of the subproblem.
        max_trials: values of sigma that one step tries.
        loss: `loss(outputs, targets)`.
        process_group: ranks that hold parts of each batch, and count by their loss terms if closures return outputs.
        maximize, seed: as in `FullBatchOptimizer`.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> optimizer = CubicNewton([w])
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: (w**2).sum() / 2)
        >>> float(loss) < 1e-8
        True
    """

    _kept = (*FullBatchOptimizer._kept, "sigma_rule")
    _adapted = ("sigma",)

    def __init__(
        self,
        params: Any,
        *,
        curvature: Literal["hessian", "ggn"] = "hessian",
        sigma: float = 1.0,
        sigma_rule: CubicRule = CubicRule(),  # noqa: B008  a frozen value
        escape: bool = False,
        rtol: float | Literal["superlinear"] = "superlinear",
        max_iterations: int | None = None,
        max_trials: int = 80,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice("curvature", curvature, ("hessian", "ggn"))
        if curvature == "ggn" and loss is None:
            raise InputError('curvature="ggn" needs loss=, and a closure that returns (outputs, targets).')
        self.sigma_rule = sigma_rule
        defaults = {
            "sigma": sigma,
            "escape": escape,
            "rtol": rtol,
            "max_iterations": max_iterations,
            "max_trials": max_trials,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, kind=curvature, loss=loss, process_group=process_group)

    def _validate(self, group: dict[str, Any]) -> None:
        check_at_least("max_trials", group["max_trials"], 1)
        check_forcing(group["rtol"])
        check_positive("sigma", group["sigma"])

    @property
    def _moves_without_gradient(self) -> bool:
        return bool(self.param_groups[0]["escape"])

    def _move(self, evaluations: Evaluations, here: Linearised, start: Tensor) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        sigma, eps = float(group["sigma"]), torch.finfo(flat.dtype).eps
        size = float(torch.linalg.vector_norm(here.gradient))
        rtol = forcing(group["rtol"], size, eps)
        message, solver = "not tried", "not run"
        for _ in range(group["max_trials"]):
            generator = self._generator(flat, 13) if group["escape"] else None
            found = cubic_subproblem(
                here.operator,
                here.gradient,
                sigma,
                rtol=rtol,
                max_iterations=group["max_iterations"],
                generator=generator,
            )
            solver = found.status.value
            if found.model_decrease == 0 and found.step_norm == 0:
                return Move(step=None, loss=here.loss, solver=solver, message="the model has its minimum here")
            loss = evaluations.value(start + found.step)
            ratio = reduction_ratio(here.loss, loss, found.model_decrease, eps)
            sigma = self.sigma_rule(sigma, ratio)
            if ratio >= self.sigma_rule.accept:
                group["sigma"] = sigma
                return Move(
                    step=found.step,
                    loss=loss,
                    solver=solver,
                    message="accepted",
                    model_decrease=found.model_decrease,
                    ratio=ratio,
                )
            message = f"no step down to a length of {found.step_norm:.2g} lowers the loss"
            if found.step_norm <= eps * max(float(torch.linalg.vector_norm(start)), eps):
                message += ", below rounding of the parameters"
                break
        group["sigma"] = sigma
        return Move(step=None, loss=here.loss, solver=solver, message=message)
