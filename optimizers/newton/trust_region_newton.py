"""Newton's method in a trust region, for Hessians of any signature.

Reference: Steihaug (1983); Gould, Lucidi, Roma and Toint (1999); Nocedal and Wright (2006), Numerical Optimization,
algorithm 4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from curvature.errors import InputError
from curvature.linalg.systems.gltr import gltr
from curvature.linalg.systems.trust_region import trust_region
from optimizers.newton.damping import RadiusRule
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import Curvature, FullBatchOptimizer, Move, Proposal
from optimizers.shared.base import Common, Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        shared: loss, process_group, maximize, seed: see `optimizers.shared.base.Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))  # the saddle of x^2 - y^2 + y^4
        >>> optimizer = TrustRegionNewton([w], subproblem="gltr", escape=True)
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
        >>> round(float(loss), 4)
        -0.25
    """

    _kept = (*FullBatchOptimizer._kept, "radius_rule")
    _adapted = "radius"
    _takes_lr = False
    _least: ClassVar[dict[str, float]] = {"max_trials": 1}
    _positive = ("radius",)
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"subproblem": ("steihaug", "gltr")}

    def __init__(
        self,
        params: Any,
        *,
        curvature: Curvature = "hessian",
        radius: float = 1.0,
        radius_rule: RadiusRule = RadiusRule(),  # noqa: B008  a frozen value
        subproblem: Literal["steihaug", "gltr"] = "steihaug",
        escape: bool = False,
        rtol: float | Literal["superlinear"] = "superlinear",
        max_iterations: int | None = None,
        max_trials: int = 40,
        **shared: Unpack[Common],
    ) -> None:
        self.radius_rule = radius_rule
        defaults: Group = {"radius": radius, "subproblem": subproblem, "escape": escape, "rtol": rtol}
        defaults |= {"max_iterations": max_iterations, "max_trials": max_trials}
        super().__init__(params, defaults, curvature, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        check_forcing(group["rtol"])
        if group["escape"] and group["subproblem"] != "gltr":
            raise InputError('escape=True needs subproblem="gltr": conjugate gradients see what the gradient sees.')

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat, g = self.param_groups[0], evaluations.flat, here.gradient
        size, eps = float(torch.linalg.vector_norm(g)), torch.finfo(flat.dtype).eps
        settings = {"rtol": forcing(group["rtol"], size, eps), "max_iterations": group["max_iterations"]}
        if size > 0:  # the subproblem is scaled by the gradient, and squares its radius
            self._adapt(min(group["radius"], 1e100 * size))

        def propose(radius: float) -> Proposal:
            if group["subproblem"] == "gltr":
                generator = self._generator(flat, 12) if group["escape"] else None
                found = gltr(here.operator, g, radius, generator=generator, **settings)
            else:
                found = trust_region(here.operator, g, radius, **settings)
            return Proposal.of(found)

        move = self._try(evaluations, here, propose, self.radius_rule, self.radius_rule.accept)
        if move.step is None:
            self._adapt(max(group["radius"], eps))
        return move


def forcing(rtol: float | str, size: float, eps: float) -> float:
    """Return the tolerance of a subproblem relative to the gradient, of length `size`."""
    if rtol == "superlinear":
        return min(0.1, max(size**0.5, eps**0.5))
    return float(rtol)


def check_forcing(rtol: Any) -> None:
    """Refuse what is neither "superlinear" nor a positive number."""
    if rtol != "superlinear" and not (isinstance(rtol, float) and rtol > 0):
        raise InputError(f'rtol must be a positive number or "superlinear", got {rtol!r}.')
