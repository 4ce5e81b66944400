"""Minimise a function or a closure by the optimizers of Newton's family, in SciPy's vocabulary.

`minimize` runs an optimizer until the gradient is small, the loss or the step no longer changes, or a budget is spent.
`to_scipy` turns the same methods into callables for `scipy.optimize.minimize(fun, x0, method=...)` on NumPy functions.

Reference: Nocedal and Wright (2006), Numerical Optimization; each method's optimizer names its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor
from typing_extensions import Self

from curvature.errors import CurvatureError, InputError, NotConvergedError, RankError
from curvature.objective.objective import Objective
from curvature.results.record import Result
from optimizers.newton.cubic_newton import CubicNewton
from optimizers.newton.damping import DampingRule
from optimizers.newton.full_batch import Evaluated, FullBatchOptimizer, StepReport
from optimizers.newton.functions import Function
from optimizers.newton.levenberg_marquardt import LevenbergMarquardt
from optimizers.newton.newton_cg import NewtonCG
from optimizers.newton.saddle_free import SaddleFreeNewton
from optimizers.newton.saddles import Look, SecondOrder, look_for_saddle
from optimizers.newton.trust_region_newton import TrustRegionNewton

__all__ = ["METHODS", "MinimizeResult", "minimize", "to_scipy"]

METHODS: dict[str, tuple[Callable[..., FullBatchOptimizer], dict[str, Any]]] = {
    "newton-cg": (
        NewtonCG,
        {"damping": 0.0, "damping_rule": None, "stop": None, "rtol": "superlinear", "warm_start": 0.0, "keep": None},
    ),
    "hessian-free": (NewtonCG, {"damping": 1e-2}),
    "trust-region": (TrustRegionNewton, {}),
    "gltr": (TrustRegionNewton, {"subproblem": "gltr"}),
    "cubic": (CubicNewton, {}),
    "saddle-free": (SaddleFreeNewton, {}),
    "levenberg-marquardt": (
        LevenbergMarquardt,
        {"damping_rule": DampingRule(highest=1.5, increase=4.0, decrease=0.2, minimum=1e-20), "rescale_below": 1e-4},
    ),
}
"""Name -> optimizer and its settings; those that need no look at the loss are left out."""


_PATIENCE = 10  # steps
_LEAST_LOOK = 32  # products


@dataclass(frozen=True, kw_only=True, repr=False)
class MinimizeResult(Result):
    """What `scipy.optimize.minimize` returns, with tensors for arrays."""

    _large = ("x", "jac")

    x: Tensor  # the solution: in x0's shape, or (n,) of all parameters
    fun: float  # the loss there; half the sum of squares for residuals
    jac: Tensor  # the gradient there, in x's shape
    nit: int  # steps that were taken
    nfev: int  # evaluations of the function or closure
    njev: int  # gradients, or linearisations of residuals
    nhev: int  # products with Hessian, Gauss-Newton matrix, Jacobian or its transpose
    status: int  # 0: converged, 1: budget spent, 2: the loss cannot be lowered further beyond rounding
    message: str  # which rule ended the run
    success: bool
    """Whether the run converged, and not to a strict saddle as far as the look at its end has seen: `second_order`."""
    curvature: float = math.nan
    """The smallest u'H u of unit vectors u that this look met, H the Hessian of the loss at x; NaN without a look."""
    second_order: SecondOrder = "not looked at"
    """What the look says: "minimum", no curvature below -1e-3 |H| but for a chance of 1 %; "not certified", none was
    met, with too few products to exclude one; "saddle"; "not looked at" by runs that did not converge, had no product
    left, or whose loss has no second derivatives."""

    def raise_if_failed(self) -> Self:
        """Return self if the run converged, else raise `NotConvergedError` that carries self."""
        if self.success:
            return self
        raise NotConvergedError(f"after {self.nit} steps: {self.message}.", self)


class _Progress:
    """Whether steps still lower the loss, or change its gradient where rounding hides the loss."""

    def __init__(self) -> None:
        self.loss, self.low, self.high, self.since = math.inf, math.inf, 0.0, 0

    def stalled(self, step: StepReport) -> bool:
        """Whether the loss, and the gradient as long as it does not double, have had no lower value for too long."""
        g = step.gradient_max
        falls = step.loss_after < self.loss
        self.since = 0 if falls or g < self.low or g > 2 * self.high else self.since + 1
        self.loss, self.low = min(self.loss, step.loss_after), min(self.low, g)
        self.high = g if falls else max(self.high, g)
        return self.since >= _PATIENCE


def minimize(
    objective: Callable[..., Any] | Objective | Function,
    x0: Tensor | None = None,
    *,
    params: Sequence[Tensor] | None = None,
    method: str = "trust-region",
    gtol: float = 1e-8,
    ftol: float = 0.0,
    xtol: float = 0.0,
    max_steps: int = 1000,
    max_gradients: int | None = None,
    callback: Callable[[StepReport], bool | None] | None = None,
    options: dict[str, Any] | None = None,
) -> MinimizeResult:
    """Minimise objective(x) from x0, a closure objective() in `params`, or a `curvature.Objective` in its own.

    Ends when the largest entry of the gradient is at most `gtol`; when a step lowers the loss by at most ftol |loss|,
    or is no longer than xtol (xtol + |x|); when a budget is spent; or when no step lowers the loss beyond rounding.

    A gradient vanishes at saddles too. So a run that has converged looks for negative curvature of the loss, by Lanczos
    from a random vector, with up to a quarter of the gradients spent so far, 32 at least. Where it finds some, it moves
    along it and goes on; else `message` tells the lowest curvature met, and `second_order` whether the look was
    complete: a curvature lower by 1e-3 |H| is then missed with a probability of 1 % at most. Saddles of higher order
    are not seen.

    Args:
        objective: returns the loss, or residuals for "levenberg-marquardt"; or an `Objective`, the loss over a whole
            data set, whose batches are walked for each evaluation and product.
        x0: start of a function; it is not changed.
        params: parameters of a closure, changed in place.
        method: one of `METHODS`.
        gtol: see above; units of the gradient.
        ftol: see above, relative; 0 for none.
        xtol: see above, relative; 0 for none.
        max_steps: most steps.
        max_gradients: most gradients, products counted with them.
        callback: called after each step with its report; True ends the run.
        options: further settings of the method's optimizer.

    Raises:
        InputError: for a method that is not there, an empty x0, or unless one of x0 and params is given.
        NonFiniteError: if loss or gradient are not finite at the start.

    Examples:
        >>> result = minimize(lambda x: ((x - 1) ** 4).sum() + x.square().sum(), torch.zeros(3, dtype=torch.float64))
        >>> result.success, bool(result.jac.abs().max() < 1e-8)
        (True, True)
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if isinstance(objective, Objective):
        if x0 is not None or params is not None:
            raise InputError("an objective has its own parameters, changed in place: leave x0 and params out.")
        if objective.shards is not None:
            raise InputError(
                "minimize changes whole parameters in place, and those of this model lie in parts on several ranks: "
                "take steps with optimizers.Sharded(model, TrustRegionNewton)."
            )
        params = list(objective.space.tensors.values())
    if (x0 is None) == (params is None):
        raise InputError("give x0 for a function of x, or params for a closure: one of them, not both.")
    closure: Evaluated = objective
    if x0 is not None and x0.numel() == 0:
        raise InputError("x0 must have at least one entry, got none.")
    if x0 is not None:
        x, of_x = x0.detach().clone().requires_grad_(), cast("Callable[..., Any]", objective)
        params, closure = [x], lambda: of_x(x)
    assert params is not None
    make, settings = METHODS[method]
    optimizer = make(list(params), **{**settings, **(options or {})})
    nfev = njev = nhev = nit = 0
    ended: tuple[int, str] | None = None
    look: Look | None = None
    progress = _Progress()
    while True:
        if nit >= max_steps or (max_gradients is not None and njev + nhev >= max_gradients):
            ended = ended or (1, "the budget of steps or gradients is spent")
        # a tolerance of infinity measures the gradient at the end, and takes no step
        optimizer._step(closure, None, gtol if ended is None else torch.inf, moves_buffers=False)
        step = optimizer.last_step
        assert step is not None
        nfev, njev, nhev = nfev + step.num_evaluations, njev + step.num_gradients, nhev + step.num_products
        if not step.accepted and (step.gradient_max <= gtol or (step.stationary and ended is None)):
            ended = 0, f"the largest entry of the gradient is {step.gradient_max:.2g}, at most gtol"
        elif not step.accepted and ended is None:
            ended = 2, step.message
        if step.accepted:
            nit += 1
            if callback is not None and callback(step):
                max_steps = nit
            size = sum(float(p.detach().square().sum()) for p in params) ** 0.5
            if (ftol > 0 and 0 <= step.loss_before - step.loss_after <= ftol * abs(step.loss_before)) or (
                xtol > 0 and step.step_norm <= xtol * (xtol + size)
            ):
                ended = 0, "the loss or the parameters no longer change, by ftol or xtol"
            elif progress.stalled(step):
                ended = 2, f"neither the loss nor its gradient has fallen in {_PATIENCE} steps: they are rounding"
            continue
        assert ended is not None
        spent = njev + nhev
        most = max(_LEAST_LOOK, spent // 4)
        most = most if max_gradients is None else min(most, max_gradients - spent - 1)
        if ended[0] == 0 and most < 1:
            ended = 0, f"{ended[1]}; no product is left to look whether it is a saddle: raise max_gradients"
        if ended[0] != 0 or most < 1:
            break
        try:
            look = look_for_saddle(optimizer, closure, most)
        except (torch.OutOfMemoryError, RankError):
            raise
        except (CurvatureError, RuntimeError) as error:  # a loss without second derivatives
            ended = 0, f"{ended[1]}; the curvature there is not known: {error}"
            break
        nfev, njev, nhev = nfev + look.num_evaluations, njev + look.num_gradients, nhev + look.num_products
        if not look.left:
            ended = look.verdict(ended[1])
            break
        nit, ended, look = nit + 1, None, None
    flat = optimizer._flat()
    g = flat.flatten([p.grad for p in flat.params])
    return MinimizeResult(
        x=x.detach() if x0 is not None else flat.get(),
        fun=step.loss_before,
        jac=g.view_as(x0) if x0 is not None else g,
        nit=nit,
        nfev=nfev,
        njev=njev,
        nhev=nhev,
        status=ended[0],
        message=ended[1],
        success=ended[0] == 0,
        curvature=math.nan if look is None else look.curvature,
        second_order="not looked at" if look is None else look.second_order,
    )


def to_scipy(method: str, **options: Any) -> Callable[..., OptimizeResult]:
    """Return a method for `scipy.optimize.minimize(fun, x0, jac=..., hessp=... or hess=..., method=to_scipy(name))`.

    `jac`, and `hessp` or `hess`, are needed: NumPy functions cannot be differentiated here. Options of
    `scipy.optimize.minimize` named `gtol`, `ftol`, `xtol`, `maxiter` go to `minimize`.

    Args:
        method: one of `METHODS`, but for "levenberg-marquardt".
        options: further settings of the method's optimizer.

    Raises:
        InputError: for a method that is not there, bounds or constraints, or derivatives that are missing.

    Examples:
        >>> from scipy.optimize import minimize as scipy_minimize, rosen, rosen_der, rosen_hess_prod
        >>> run = to_scipy("trust-region")
        >>> found = scipy_minimize(rosen, [-1.2, 1.0], jac=rosen_der, hessp=rosen_hess_prod, method=run)
        >>> found.success, found.x.round(6).tolist()
        (True, [1.0, 1.0])
    """
    if method not in METHODS or method == "levenberg-marquardt":
        allowed = ", ".join(name for name in METHODS if name != "levenberg-marquardt")
        raise InputError(f"method must be one of {allowed}, got {method!r}; for residuals call minimize().")

    def run(
        fun: Callable[..., Any],
        x0: Any,
        args: tuple[Any, ...] = (),
        jac: Any = None,
        hess: Any = None,
        hessp: Any = None,
        bounds: Any = None,
        constraints: Any = (),
        callback: Any = None,
        **others: Any,
    ) -> OptimizeResult:
        if bounds is not None or constraints:
            raise InputError("bounds and constraints are not supported; use SciPy's own methods.")
        if not callable(jac) or not (callable(hessp) or callable(hess)):
            raise InputError("jac, and hessp or hess, must be functions: give the derivatives.")

        def product(x: np.ndarray, v: np.ndarray) -> Any:
            return hessp(x, v, *args) if callable(hessp) else hess(x, *args) @ v

        x = torch.tensor(np.asarray(x0, dtype=np.float64), requires_grad=True)

        def at_x(f: Callable[..., Any], *more: Any) -> Any:
            return f(x.detach().numpy().copy(), *more)

        function = Function(
            value=lambda: float(at_x(fun, *args)),
            value_and_gradient=lambda: (float(at_x(fun, *args)), _double(at_x(jac, *args))),
            product=lambda _, v: _double(at_x(product, v.numpy().copy())),
        )
        names = {"maxiter": "max_steps"} | {name: name for name in ("gtol", "ftol", "xtol", "max_gradients")}
        known = {names[name]: value for name, value in others.items() if name in names and value is not None}
        result = minimize(
            function,
            params=[x],
            method=method,
            options=options,
            callback=None if callback is None else (lambda _: at_x(callback)),
            **known,
        )
        found = {name: getattr(result, name) for name in ("fun", "nit", "nfev", "njev", "nhev", "status", "message")}
        return OptimizeResult(x=result.x.numpy(), jac=result.jac.numpy(), success=result.success, **found)

    return run


def _double(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array, dtype=np.float64))
