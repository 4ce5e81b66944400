"""Newton's method with adaptive cubic regularisation (ARC).

Reference: Cartis, Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained optimization, part I,
algorithm 2.1; Nesterov and Polyak (2006), Cubic regularization of Newton method and its global performance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from curvature.linalg.systems.gltr import cubic_subproblem
from optimizers.newton.damping import CubicRule
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import Curvature, FullBatchOptimizer, Move, Proposal
from optimizers.newton.trust_region_newton import check_forcing, forcing
from optimizers.shared.base import Common, Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        shared: loss, process_group, maximize, seed: see `optimizers.shared.base.Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> optimizer = CubicNewton([w])
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: (w**2).sum() / 2)
        >>> float(loss) < 1e-8
        True
    """

    _kept = (*FullBatchOptimizer._kept, "sigma_rule")
    _adapted = "sigma"
    _takes_lr = False
    _least: ClassVar[dict[str, float]] = {"max_trials": 1}
    _positive = ("sigma",)

    def __init__(
        self,
        params: Any,
        *,
        curvature: Curvature = "hessian",
        sigma: float = 1.0,
        sigma_rule: CubicRule = CubicRule(),  # noqa: B008  a frozen value
        escape: bool = False,
        rtol: float | Literal["superlinear"] = "superlinear",
        max_iterations: int | None = None,
        max_trials: int = 80,
        **shared: Unpack[Common],
    ) -> None:
        self.sigma_rule = sigma_rule
        defaults: Group = {"sigma": sigma, "escape": escape, "rtol": rtol}
        defaults |= {"max_iterations": max_iterations, "max_trials": max_trials}
        super().__init__(params, defaults, curvature, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        check_forcing(group["rtol"])

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat, g = self.param_groups[0], evaluations.flat, here.gradient
        rtol = forcing(group["rtol"], float(torch.linalg.vector_norm(g)), torch.finfo(flat.dtype).eps)

        def propose(sigma: float) -> Proposal:
            generator = self._generator(flat, 13) if group["escape"] else None
            settings = {"rtol": rtol, "max_iterations": group["max_iterations"], "generator": generator}
            return Proposal.of(cubic_subproblem(here.operator, g, sigma, **settings))

        rule = self.sigma_rule
        return self._try(evaluations, here, propose, lambda sigma, ratio, _: rule(sigma, ratio), rule.low)
