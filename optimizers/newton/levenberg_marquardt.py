"""Levenberg and Marquardt's method for sums of squares.

Reference: Levenberg (1944); Marquardt (1963); More (1978), The Levenberg-Marquardt algorithm: implementation and
theory; Transtrum and Sethna (2012), Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
minimization, for the acceleration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.lsmr import lsmr
from curvature.linop import LinearOperator
from optimizers.newton.damping import DampingRule, reduction_ratio
from optimizers.newton.dense_jacobian import DampedLeastSquares, column_norms, dense_jacobian
from optimizers.newton.evaluations import Evaluations, Linearised, ResidualJacobian
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.shared.validate import check_at_least, check_choice, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Jacobian", "LevenbergMarquardt"]

Jacobian = Callable[[Sequence[Tensor]], Tensor]
"""Parameters -> J, (m, n) in their order, at their present values."""

_MOST = 2048  # rows or columns, up to which a dense factorisation is a small matter
_LARGEST = 2**26  # entries of a dense J
_ACCEPTED = 1e-4  # ratio from which a step is taken
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

    Example:
        >>> t = torch.linspace(0, 1, 8, dtype=torch.float64)
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> optimizer = LevenbergMarquardt([w])
        >>> for _ in range(12):
        ...     loss = optimizer.step(lambda: w[0] * torch.exp(-w[1] * t) - 3 * torch.exp(-2 * t))
        >>> w.detach().round(decimals=6).tolist()
        [3.0, 2.0]
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule", "jacobian")
    _adapted = ("damping",)
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
        if process_group is not None:
            raise InputError(
                "residuals are solved for on one rank: gather them there, or use NewtonCG or NaturalGradient with "
                "loss=, which average over ranks."
            )
        self.damping_rule, self.jacobian = damping_rule, jacobian
        defaults = {
            "damping": damping,
            "rescale_below": rescale_below,
            "method": method,
            "acceleration": acceleration,
            "rtol": rtol,
            "max_iterations": max_iterations,
            "max_trials": max_trials,
            "seed": seed,
        }
        super().__init__(params, defaults, kind="residuals")

    def _validate(self, group: dict[str, Any]) -> None:
        check_choice("method", group["method"], ("auto", "dense", "lsmr"))
        check_at_least("max_trials", group["max_trials"], 1)
        check_at_least("acceleration", group["acceleration"], 0)
        check_at_least("rescale_below", group["rescale_below"], 0)
        check_positive("damping", group["damping"])
        if not group["rtol"] > 0:
            raise InputError(f"rtol must be positive, got {group['rtol']}.")

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
                here = evaluations.linearise()
                J = self._dense(here.operator)
        finally:
            evaluations.finish(keep=False)
        assert here.residuals is not None
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
        return float(here.residuals @ here.residuals) / (m - n) * (inverse @ inverse.T)

    def _move(self, evaluations: Evaluations, here: Linearised, start: Tensor) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        r, J = here.residuals, here.operator
        assert r is not None
        m, n = J.shape
        small = min(m, n) <= _MOST and m * n <= _LARGEST
        system: _Dense | _Iterative
        if self.jacobian is not None or group["method"] == "dense" or (group["method"] == "auto" and small):
            dense = self._dense(J)
            stale = group["damping"] < group["rescale_below"]
            scale = column_norms(dense, None if stale else self._recall(flat, "column_scale"))
            self._remember(flat, column_scale=scale)
            system = _Dense(dense, r, here.gradient, scale)
        else:
            system = _Iterative(J, r, here.gradient, group["rtol"], group["max_iterations"])
        bends = group["acceleration"] > 0
        damping, eps = float(group["damping"]), torch.finfo(flat.dtype).eps
        message = "not tried"
        for trial in range(group["max_trials"]):
            d = system.solve(-r, damping)
            if bool(d.isfinite().all()):
                model, bent = system.decrease(d), False
                if bends:
                    d, bent = self._bent(evaluations, system, start, d, damping)
                loss = evaluations.value(start + d)
                ratio = reduction_ratio(here.loss, loss, model, eps)
                if ratio > _ACCEPTED:
                    group["damping"] = self.damping_rule(damping, ratio)
                    return Move(
                        step=d,
                        loss=loss,
                        solver=system.ended,
                        message=f"accepted at the {trial + 1}. damping tried" + (", accelerated" if bent else ""),
                        model_decrease=model,
                        ratio=ratio,
                    )
                shortest = float(torch.linalg.vector_norm(d))
                message = f"no damping up to {damping:.2g} lowers the loss; the last step has length {shortest:.2g}"
                if shortest <= eps * float(torch.linalg.vector_norm(start)):
                    message += ", below rounding of the parameters"
                    break
            risen = self.damping_rule(damping, -math.inf)
            if not risen > damping:
                break
            damping = risen
        group["damping"] = damping
        return Move(step=None, loss=here.loss, solver=system.ended, message=message)

    def _bent(
        self, evaluations: Evaluations, system: _Dense | _Iterative, start: Tensor, d: Tensor, damping: float
    ) -> tuple[Tensor, bool]:
        """Return d + a / 2 and True where the acceleration a is small enough, d and False elsewhere."""
        ahead = evaluations.residuals(start + _REACH * d)
        second = 2 / _REACH * ((ahead - system.r) / _REACH - system.J @ d)
        noise = 8 * torch.finfo(d.dtype).eps / _REACH**2 * float(torch.linalg.vector_norm(system.r))
        if not noise < float(torch.linalg.vector_norm(second)) < math.inf:
            return d, False
        a = system.solve(-second, damping)
        if not 2 * system.size_of(a) <= self.param_groups[0]["acceleration"] * system.size_of(d):
            return d, False
        return d + a / 2, True

    def _dense(self, J: LinearOperator) -> Tensor:
        assert isinstance(J, ResidualJacobian)
        if self.jacobian is None:
            return dense_jacobian(J)
        found = self.jacobian(J.products.flat.params).detach().to(J.device, J.dtype)
        if tuple(found.shape) != J.shape:
            raise InputError(f"jacobian must return a matrix of shape {J.shape}, got {tuple(found.shape)}.")
        return found


class _Dense:
    ended = "solved directly"

    def __init__(self, J: Tensor, r: Tensor, gradient: Tensor, scale: Tensor) -> None:
        self.J, self.r, self.gradient = J, r, gradient
        self.system = DampedLeastSquares(J, scale)

    def solve(self, b: Tensor, damping: float) -> Tensor:
        return self.system.solve(b, damping)

    def size_of(self, d: Tensor) -> float:
        return float(torch.linalg.vector_norm(self.system.scale * d))

    def decrease(self, d: Tensor) -> float:
        return -float(self.gradient @ d) - float((self.J @ d).square().sum()) / 2


class _Iterative:
    def __init__(self, J: LinearOperator, r: Tensor, gradient: Tensor, rtol: float, max_iterations: int | None) -> None:
        self.J, self.r, self.gradient = J, r, gradient
        self.rtol, self.max_iterations = rtol, max_iterations
        self.size = float(torch.linalg.vector_norm(gradient) / torch.linalg.vector_norm(r))  # at most |J|
        self.ended = "not run"

    def solve(self, b: Tensor, damping: float) -> Tensor:
        result = lsmr(
            self.J,
            b,
            damping=damping * self.size**2,
            rtol=self.rtol,
            max_iterations=self.max_iterations,
        )
        self.ended = result.status.value
        return result.x

    def size_of(self, d: Tensor) -> float:
        return float(torch.linalg.vector_norm(d))

    def decrease(self, d: Tensor) -> float:
        return -float(self.gradient @ d) - float((self.J @ d).square().sum()) / 2
