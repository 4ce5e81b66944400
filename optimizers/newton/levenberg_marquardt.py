"""Levenberg and Marquardt's method for sums of squares.

Reference: Levenberg (1944); Marquardt (1963); More (1978), The Levenberg-Marquardt algorithm: implementation and
theory; Transtrum and Sethna (2012), Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
minimization, for the acceleration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.lsmr import lsmr
from optimizers.newton.damping import ACCEPTED, DampingRule
from optimizers.newton.dense_jacobian import DampedLeastSquares, Jacobian, column_norms, dense_jacobian
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move, Proposal
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LevenbergMarquardt"]

_MOST = 2048  # rows or columns, up to which a dense factorisation is a small matter
_LARGEST = 2**26  # entries of a dense J
_REACH = 0.1  # of the step, where the residuals' bend along it is measured


class LevenbergMarquardt(FullBatchOptimizer):
    """Minimise |r|^2 / 2 by steps that minimise |r + J d|^2 + lambda |D d|^2.

    The closure returns the residuals r, one tensor or several; the loss reported is |r|^2 / 2. Within a step lambda
    rises until the loss falls by enough, with J kept; afterwards it falls where the model was good.

    Each step d is bent by the geodesic acceleration a that solves the same damped problem for the second derivative of
    the residuals along d, d + a / 2, as long as a is small beside d: one evaluation more, and in curved valleys, such
    as those of physics-informed networks, steps that are longer by orders of magnitude.

    - "dense": J as a matrix with columns scaled by D, the largest norm each has had, so that units of parameters do not
      matter. Exact, by QR of [J D^-1; lambda^(1/2) I]: J'J, whose condition number is squared, is never formed. With
      fewer residuals than parameters the same in the space of residuals (kernel form, J J'). Cost: min(m, 2 n) backward
      passes, or the `jacobian` given; m n min(m, n) operations.
    - "lsmr": products with J and J' only, D one number. Cost: two products an iteration.
    - "auto": dense if min(m, n) <= 2048 and J has at most 2^26 entries.

    Use float64 for more than 3 or 4 digits.

    Args:
        params: parameters or groups of them.
        damping: lambda at first, relative to D^2.
        damping_rule: maps (lambda, ratio) to the next lambda.
        rescale_below: lambda below which D is of the present columns; for curve fitting, where columns change by many
            orders of magnitude, 1e-4, as `minimize` has it. Networks are fitted more accurately without.
        method: see above.
        acceleration: largest 2 |D a| / |D d| with which a is added; 0 for plain steps.
        jacobian: J at present values as a matrix, in the order of the parameters (see `PointwiseResiduals`); default:
            by differentiating the closure.
        rtol: of lsmr.
        max_iterations: of lsmr.
        max_trials: values of lambda that one step tries.
        process_group: refused; residuals are solved for on one rank.
        seed: as in `FullBatchOptimizer`; the method draws no random numbers.

    Raises:
        InputError: for settings out of range, and for a process group.

    Examples:
        >>> t = torch.linspace(0, 1, 8, dtype=torch.float64)
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> optimizer = LevenbergMarquardt([w])
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: w[0] * torch.exp(-w[1] * t) - 3 * torch.exp(-2 * t))
        >>> w.detach().round(decimals=6).tolist()
        [3.0, 2.0]
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule", "jacobian")
    _adapted = "damping"
    _takes_lr = False
    _least: ClassVar[dict[str, float]] = {"max_trials": 1, "acceleration": 0, "rescale_below": 0}
    _positive = ("damping", "rtol")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"method": ("auto", "dense", "lsmr")}
    _late_settings = FullBatchOptimizer._late_settings | {"rescale_below": 0.0}

    def __init__(
        self,
        params: Any,
        *,
        damping: float = 1e-2,
        damping_rule: Callable[[float, float], float] = DampingRule(increase=4.0, decrease=0.2, minimum=1e-20),  # noqa: B008
        rescale_below: float = 0.0,
        method: Literal["auto", "dense", "lsmr"] = "auto",
        acceleration: float = 0.75,
        jacobian: Jacobian | None = None,
        rtol: float = 1e-8,
        max_iterations: int | None = None,
        max_trials: int = 40,
        process_group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        self.damping_rule, self.jacobian = damping_rule, jacobian
        defaults: Group = {"damping": damping, "rescale_below": rescale_below, "method": method, "seed": seed}
        defaults |= {"acceleration": acceleration, "rtol": rtol}
        defaults |= {"max_iterations": max_iterations, "max_trials": max_trials}
        super().__init__(params, defaults, "residuals", process_group=process_group)

    def covariance(self, closure: Callable[[], Any]) -> Tensor:
        """Return s^2 (J'J)^-1, s^2 = |r|^2 / (m - n), at the present parameters: of their errors, at a minimum.

        By QR of the column-scaled J, so that it is right where J'J is singular to rounding. The roots of its diagonal
        are the standard errors of curve fitting.

        Raises:
            InputError: unless there are more residuals than parameters, and J has full rank.
        """
        flat = self._flat()
        evaluations = Evaluations(flat, closure, None, kind="residuals", loss=None, rule=None)
        try:
            with evaluations.watched():
                jacobian, r = evaluations.linearise().least_squares
                J = dense_jacobian(jacobian, self.jacobian)
        finally:
            evaluations.finish(keep=False)
        m, n = J.shape
        if m <= n:
            raise InputError(f"a covariance needs more residuals than parameters, got {m} and {n}.")
        D = column_norms(J, None)
        R = torch.linalg.qr(J / D)[1]
        smallest = float(R.diagonal().abs().min())
        if smallest <= n * torch.finfo(R.dtype).eps:
            raise InputError("J has no full rank: the residuals leave a combination of the parameters undetermined.")
        identity = torch.eye(n, dtype=R.dtype, device=R.device)
        inverse = torch.linalg.solve_triangular(R, identity, upper=True) / D[:, None]
        return float(r @ r) / (m - n) * (inverse @ inverse.T)

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat, g = self.param_groups[0], evaluations.flat, here.gradient
        J, r = here.least_squares
        small = min(J.shape) <= _MOST and J.shape[0] * J.shape[1] <= _LARGEST
        matrix: Any = J
        scale: Tensor | float = 1.0
        statuses, unit = ["solved directly"], float(torch.linalg.vector_norm(g) / torch.linalg.vector_norm(r))

        def iterate(b: Tensor, damping: float) -> Tensor:
            damping *= unit**2  # at most |J|^2
            found = lsmr(J, b, damping=damping, rtol=group["rtol"], max_iterations=group["max_iterations"])
            statuses.append(found.status.value)
            return found.x

        solve = iterate
        if self.jacobian is not None or group["method"] == "dense" or (group["method"] == "auto" and small):
            matrix = dense_jacobian(J, self.jacobian)
            stale = group["damping"] < group["rescale_below"]
            scale = column_norms(matrix, None if stale else self._recall(flat, "column_scale"))
            self._remember(flat, column_scale=scale)
            solve = DampedLeastSquares(matrix, scale).solve

        def bend(d: Tensor, damping: float) -> Tensor | None:
            """Return the acceleration, None where it is too long or rounding."""
            ahead = evaluations.residuals(evaluations.start + _REACH * d)
            second = 2 / _REACH * ((ahead - r) / _REACH - matrix @ d)
            noise = 8 * torch.finfo(d.dtype).eps / _REACH**2 * float(torch.linalg.vector_norm(r))
            if not noise < float(torch.linalg.vector_norm(second)) < math.inf:
                return None
            a = solve(-second, damping)
            sizes = [float(torch.linalg.vector_norm(scale * v)) for v in (a, d)]
            return a if 2 * sizes[0] <= group["acceleration"] * sizes[1] else None

        def propose(damping: float) -> Proposal:
            d = solve(-r, damping)
            model = -float(g @ d) - float((matrix @ d).square().sum()) / 2
            a = bend(d, damping) if group["acceleration"] > 0 and bool(d.isfinite().all()) else None
            d = d if a is None else d + a / 2
            note = "" if a is None else ", accelerated"
            length = float(torch.linalg.vector_norm(d))
            return Proposal(d, model, length, statuses[-1], note)

        def follow(damping: float, ratio: float, _: float) -> float:
            return self.damping_rule(damping, ratio if ratio >= ACCEPTED else -math.inf)

        return self._try(evaluations, here, propose, follow, ACCEPTED)
