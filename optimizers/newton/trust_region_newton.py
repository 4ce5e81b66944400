"""Newton's method in a trust region, for Hessians of any signature.

Reference: Steihaug (1983); Gould, Lucidi, Roma and Toint (1999); Nocedal and Wright (2006), Numerical Optimization,
algorithm 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.gltr import gltr
from curvature.linalg.systems.trust_region import trust_region
from optimizers.newton.damping import RadiusRule, reduction_ratio
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.shared.validate import check_at_least, check_choice, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TrustRegionNewton"]


class TrustRegionNewton(FullBatchOptimizer):
    """Steps that make g's + s'A s / 2 small over |s| <= radius; the radius follows how well the model did.

    Within a step the radius shrinks, with gradient and graph kept, until the loss falls by enough. Negative curvature
    is no obstacle: the step goes to the boundary along it.

    - "steihaug": truncated conjugate gradients; the cheapest step.
    - "gltr": the best step of the Krylov space, by Lanczos. With `escape`, also directions that the gradient does not
      see are searched once it has converged: an exact saddle, where g = 0, is left.

    Cost of a step: a gradient with graph, and for each radius tried a product an iteration and a loss.

    Args:
        params: parameters or groups of them.
        curvature: "hessian", for closures that return the loss; "ggn", for (outputs, targets) with `loss`.
        radius: at first; units of the parameters.
        radius_rule: maps (radius, ratio, |s|) to the next radius and holds the ratio from which a step is taken.
        subproblem: see above.
        escape: see above; for "gltr".
        rtol: residual of the subproblem relative to |g|; "superlinear" takes min(1/10, |g|^(1/2)).
        max_iterations: of the subproblem.
        max_trials: radii that one step tries.
        loss: `loss(outputs, targets)`.
        process_group: ranks that hold parts of each batch, and count by their loss terms if closures return outputs.
        maximize, seed: as in `FullBatchOptimizer`.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))  # the saddle of x^2 - y^2 + y^4
        >>> optimizer = TrustRegionNewton([w], subproblem="gltr", escape=True)
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
        >>> round(float(loss), 4)
        -0.25
    """

    _kept = (*FullBatchOptimizer._kept, "radius_rule")
    _adapted = ("radius",)

    def __init__(
        self,
        params: Any,
        *,
        curvature: Literal["hessian", "ggn"] = "hessian",
        radius: float = 1.0,
        radius_rule: RadiusRule = RadiusRule(),  # noqa: B008  a frozen value
        subproblem: Literal["steihaug", "gltr"] = "steihaug",
        escape: bool = False,
        rtol: float | Literal["superlinear"] = "superlinear",
        max_iterations: int | None = None,
        max_trials: int = 40,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice("curvature", curvature, ("hessian", "ggn"))
        if curvature == "ggn" and loss is None:
            raise InputError('curvature="ggn" needs loss=, and a closure that returns (outputs, targets).')
        self.radius_rule = radius_rule
        defaults = {
            "radius": radius,
            "subproblem": subproblem,
            "escape": escape,
            "rtol": rtol,
            "max_iterations": max_iterations,
            "max_trials": max_trials,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, kind=curvature, loss=loss, process_group=process_group)

    def _validate(self, group: dict[str, Any]) -> None:
        check_choice("subproblem", group["subproblem"], ("steihaug", "gltr"))
        check_at_least("max_trials", group["max_trials"], 1)
        check_forcing(group["rtol"])
        check_positive("radius", group["radius"])
        if group["escape"] and group["subproblem"] != "gltr":
            raise InputError('escape=True needs subproblem="gltr": conjugate gradients see what the gradient sees.')

    @property
    def _moves_without_gradient(self) -> bool:
        return bool(self.param_groups[0]["escape"])

    def _move(self, evaluations: Evaluations, here: Linearised, start: Tensor) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        radius, eps = float(group["radius"]), torch.finfo(flat.dtype).eps
        size = float(torch.linalg.vector_norm(here.gradient))
        settings: dict[str, Any] = {
            "rtol": forcing(group["rtol"], size, eps),
            "max_iterations": group["max_iterations"],
        }
        message, solver = "not tried", "not run"
        if size > 0:
            radius = min(radius, 1e100 * size)  # the subproblem is scaled by the gradient, and squares its radius
        for _ in range(group["max_trials"]):
            if group["subproblem"] == "gltr":
                generator = self._generator(flat, 12) if group["escape"] else None
                found = gltr(here.operator, here.gradient, radius, generator=generator, **settings)
            else:
                found = trust_region(here.operator, here.gradient, radius, **settings)
            solver = found.status.value
            if found.model_decrease == 0 and found.step_norm == 0:
                return Move(step=None, loss=here.loss, solver=solver, message="the model has its minimum here")
            s = found.step
            loss = evaluations.value(start + s)
            ratio = reduction_ratio(here.loss, loss, found.model_decrease, eps)
            radius = self.radius_rule(radius, ratio, found.step_norm)
            if ratio >= self.radius_rule.accept:
                group["radius"] = radius
                return Move(
                    step=s,
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
        group["radius"] = max(radius, eps)
        return Move(step=None, loss=here.loss, solver=solver, message=message)


def forcing(rtol: float | str, size: float, eps: float) -> float:
    """Return the tolerance of a subproblem relative to the gradient, of length `size`."""
    if rtol == "superlinear":
        return min(0.1, max(size**0.5, eps**0.5))
    return float(rtol)


def check_forcing(rtol: Any) -> None:
    """Refuse what is neither "superlinear" nor a positive number."""
    if rtol != "superlinear" and not (isinstance(rtol, float) and rtol > 0):
        raise InputError(f'rtol must be a positive number or "superlinear", got {rtol!r}.')
