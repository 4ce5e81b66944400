"""Newton's method with the absolute values of eigenvalues, in a Krylov space: saddles repel instead of attracting.

Reference: Dauphin, Pascanu, Gulcehre, Cho, Ganguli and Bengio (2014), Identifying and attacking the saddle point
problem in high-dimensional non-convex optimization, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from curvature.linalg.krylov.lanczos import lanczos
from optimizers.newton.damping import ACCEPTED, DampingRule
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move, Proposal
from optimizers.shared.base import Common, Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        shared: loss, process_group, maximize, seed: see `optimizers.shared.base.Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1e-3]))  # beside the saddle of x^2 - y^2 + y^4
        >>> optimizer = SaddleFreeNewton([w])
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
        >>> round(float(loss), 4)
        -0.25
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule")
    _adapted = "damping"
    _least: ClassVar[dict[str, float]] = {"basis_size": 1, "max_trials": 1}
    _positive = ("damping",)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        num_steps: int = 20,
        damping: float = 1e-2,
        damping_rule: Callable[[float, float], float] = DampingRule(increase=4.0, decrease=0.25, minimum=1e-12),  # noqa: B008
        max_trials: int = 40,
        **shared: Unpack[Common],
    ) -> None:
        self.damping_rule = damping_rule
        defaults: Group = {"lr": lr, "basis_size": num_steps, "damping": damping, "max_trials": max_trials}
        super().__init__(params, defaults, "hessian", **shared)

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        krylov = lanczos(here.operator, here.gradient, num_steps=min(int(group["basis_size"]), flat.n))
        theta, S = torch.linalg.eigh(
            torch.diag(krylov.alpha) + torch.diag(krylov.beta, 1) + torch.diag(krylov.beta, -1)
        )
        sizes, c = theta.abs(), S[0] * torch.linalg.vector_norm(here.gradient)
        rates, largest = self._rates(flat), float(sizes.max())
        negative = int((theta < -flat.n * torch.finfo(flat.dtype).eps * sizes.max()).sum())
        solver = f"basis of {len(theta)}" + (", invariant" if krylov.breakdown else "")
        solver += f", {negative} of negative curvature" if negative else ""

        def propose(damping: float) -> Proposal:
            d = rates * (krylov.basis @ (S @ (-c / (sizes + damping))))
            model = float(c.square() @ (1 / (sizes + damping) - sizes / (2 * (sizes + damping) ** 2)))
            return Proposal(d, model, float(torch.linalg.vector_norm(d)), solver)

        def follow(damping: float, ratio: float, _: float) -> float:
            if ratio >= ACCEPTED:
                return self.damping_rule(damping, ratio)
            return max(self.damping_rule(damping, -math.inf), 1e-3 * largest)

        return self._try(evaluations, here, propose, follow, ACCEPTED)
