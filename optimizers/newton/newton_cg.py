"""Newton's method with conjugate gradients: Hessian-free optimization, on the Hessian or the Gauss-Newton matrix.

Reference: Martens (2010), Deep learning via Hessian-free optimization; Martens and Sutskever (2012), Training deep and
recurrent networks with Hessian-free optimization; Nocedal and Wright (2006), Numerical Optimization, section 7.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.cg import cg
from curvature.linalg.systems.stopping import RelativeProgress
from curvature.results.solves import SolveResult
from optimizers.newton.damping import DampingRule, reduction_ratio
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import Curvature, FullBatchOptimizer, Move
from optimizers.newton.line_search import Armijo, Line, LineSearch, LineSearchResult
from optimizers.newton.preconditioners import Preconditioner, newton_preconditioner
from optimizers.newton.trust_region_newton import check_forcing
from optimizers.shared.base import Common, Group, check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NewtonCG"]


class NewtonCG(FullBatchOptimizer):
    """Steps from (A + lambda I) d = -g by conjugate gradients, A the Hessian or the Gauss-Newton matrix.

    The recipe, every part of which can be exchanged:

    1. CG starts from `warm_start` times the last solution and ends when a step adds too little (`stop`), at
       `rtol |g|`, after `max_iterations`, or along a direction of no positive curvature.
    2. Of the iterates kept after ceil(1.3^j) steps, the last for which going further back does not lower the loss.
    3. Where CG met negative curvature, its direction, signed downhill, is added to the iterate before.
    4. A line search along the result.
    5. lambda follows the ratio of the loss's decrease to that of the undamped model, before the line search.

    With damping=0 and `damping_rule=None`, `stop=None`, `rtol="superlinear"`, it is the truncated Newton method.

    Cost of a step: a gradient with graph, a product an iteration (about 2 gradients for the Hessian), a loss for each
    iterate and each t tried. Memory: the graph of the gradient and 6 + log(iterations) / log(1.3) vectors.

    Args:
        params: parameters or groups of them.
        lr: first t that the line search tries; a factor on the step without one.
        curvature: "hessian", for closures that return the loss; "ggn", for (outputs, targets) with `loss`.
        damping: lambda at first.
        damping_rule: maps (lambda, ratio) to the next lambda; None keeps it.
        stop: rule of `cg` on the model's values; None for none.
        rtol: CG's residual, relative to |g|; "superlinear" takes min(1/2, |g|^(1/2)).
        max_iterations: of CG.
        preconditioner: the inverse that CG applies: None; "diagonal", (|diag A| + lambda)^(-3/4) by random signs;
            "nystrom", of the largest eigenpairs in magnitude, refreshed every `refresh_every` steps; or a function of
            (A, lambda, generator) that returns an object whose `@` applies it.
        rank: eigenpairs of "nystrom", probes of "diagonal".
        refresh_every: steps between refreshes of the eigenpairs.
        warm_start: factor on the last solution; 0 for cold starts.
        keep: growth of the spacing of kept iterates; None keeps the last only.
        line_search: `Armijo`, `Grid`, `StrongWolfe`, or a function of (line, first t); None takes t = lr, if the loss
            falls.
        shared: loss, process_group, maximize, seed: see `optimizers.shared.base.Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = NewtonCG([w], damping=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([1.0, 100.0]) * w**2).sum())
        >>> w.detach().abs().max() < 1e-3, optimizer.last_step.accepted
        (tensor(True), True)
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule", "stop", "preconditioner", "line_search")
    _adapted = "damping"
    _least: ClassVar[dict[str, float]] = {"damping": 0, "max_iterations": 1, "rank": 1, "refresh_every": 1}

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: Curvature = "hessian",
        damping: float = 1.0,
        damping_rule: Callable[[float, float], float] | None = DampingRule(),  # noqa: B008  a frozen value
        stop: Callable[[Sequence[float]], bool] | None = RelativeProgress(),  # noqa: B008
        rtol: float | Literal["superlinear"] = 1e-10,
        max_iterations: int = 250,
        preconditioner: Literal["diagonal", "nystrom"] | Preconditioner | None = None,
        rank: int = 20,
        refresh_every: int = 20,
        warm_start: float = 0.95,
        keep: float | None = 1.3,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        **shared: Unpack[Common],
    ) -> None:
        if isinstance(preconditioner, str):
            check_choice("preconditioner", preconditioner, ("diagonal", "nystrom"))
        self.damping_rule, self.stop, self.line_search = damping_rule, stop, line_search
        self.preconditioner = preconditioner
        defaults: Group = {"lr": lr, "damping": damping, "rtol": rtol, "max_iterations": max_iterations, "rank": rank}
        defaults |= {"refresh_every": refresh_every, "warm_start": warm_start, "keep": keep}
        super().__init__(params, defaults, curvature, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        check_forcing(group["rtol"])
        if not 0 <= group["warm_start"] <= 1:
            raise InputError(f"warm_start must be in [0, 1], got {group['warm_start']}.")
        if group["keep"] is not None and not group["keep"] > 1:
            raise InputError(f"keep must be above 1, or None, got {group['keep']}.")

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat, start = self.param_groups[0], evaluations.flat, evaluations.start
        damping, g, A = float(group["damping"]), here.gradient, here.operator
        P = newton_preconditioner(self, flat, A, damping)
        last = self._recall(flat, "newton_direction") if group["warm_start"] > 0 else None
        for x0 in (None,) if last is None else (group["warm_start"] * last, None):
            found = self._solve(g, A, damping, P, x0)
            d, model, loss = self._direction(evaluations, found, damping, g, A)
            if float(g @ d) < 0 and float(g @ found.x) < 0:  # else a stale start left CG, or what was kept, uphill
                break
        self._remember(flat, newton_direction=found.x)
        # parts of a step may move at rates of their own; the direction is then theirs
        rates = self._rates(flat)
        initial = rates if isinstance(rates, float) else 1.0
        if not isinstance(rates, float):
            d, loss = rates * d, math.nan
            model = float(g @ d + d @ (A @ d) / 2)
        if math.isnan(loss):
            loss = evaluations.value(start + d)
        eps = torch.finfo(flat.dtype).eps
        ratio = reduction_ratio(here.loss, loss, -model, eps)
        if self.damping_rule is not None:
            self._adapt(self.damping_rule(damping, ratio))
        searched = self._search(evaluations.line(here, d, at_one=loss, curvature=2 * (model - float(g @ d))), initial)
        solver = found.status.value
        if not searched.success and searched.step == 0.0:
            if self.damping_rule is not None and damping > 0:
                self._adapt(max(group["damping"], self.damping_rule(damping, -math.inf)))
            self._remember(flat, newton_direction=torch.zeros_like(d))
            return Move(None, here.loss, solver, searched.message, ratio=ratio)
        return Move(searched.step * d, searched.value, solver, searched.message, -model, ratio)

    def _solve(self, g: Tensor, A: Any, damping: float, P: Any, x0: Tensor | None) -> SolveResult:
        group = self.param_groups[0]
        rtol = group["rtol"]
        if rtol == "superlinear":
            rtol = min(0.5, max(float(torch.linalg.vector_norm(g)) ** 0.5, torch.finfo(g.dtype).eps))
        settings = {"rtol": rtol, "max_iterations": group["max_iterations"], "stop": self.stop, "keep": group["keep"]}
        return cg(A, -g, damping=damping, preconditioner=P, x0=x0, **settings)

    def _model(self, found: SolveResult, damping: float, d: Tensor, step: int) -> float:
        """Return g'd + d'A d / 2, without damping."""
        assert found.model_history is not None
        history = found.model_history[~found.model_history.isnan()]
        return float(history[step]) - damping / 2 * float(d @ d)

    def _direction(
        self, evaluations: Evaluations, found: SolveResult, damping: float, g: Tensor, A: Any
    ) -> tuple[Tensor, float, float]:
        """Return (d, model, loss) along negative curvature, where it was met and the loss is NaN, or of the best kept.

        That is the iterate from which going further back does not lower the loss.
        """
        if found.direction is not None:
            return *_with_negative_curvature(found, g, A), math.nan
        start, d, model = evaluations.start, found.x, self._model(found, damping, found.x, -1)
        loss = evaluations.value(start + d)
        for kept in reversed(found.kept):
            if kept.step >= found.num_iterations[0]:
                continue
            earlier = evaluations.value(start + kept.x)
            if not earlier < loss:
                if math.isinf(loss):
                    continue
                break
            d, model, loss = kept.x, self._model(found, damping, kept.x, kept.step), earlier
        return d, model, loss

    def _search(self, line: Line, initial: float) -> LineSearchResult:
        if self.line_search is not None:
            return self.line_search(line, initial)
        reached = line.value(initial)
        ok = reached <= line.start + line.noise
        message = "full step" if ok else "the full step raises the loss, and there is no line search to shorten it"
        return LineSearchResult(initial if ok else 0.0, reached, 1, ok, message)


def _with_negative_curvature(found: SolveResult, g: Tensor, A: Any) -> tuple[Tensor, float]:
    """Return CG's iterate plus its direction of no positive curvature, as long as the iterate, and the model there."""
    assert found.direction is not None
    x, u = found.x, found.direction
    downhill = u if float(g @ u) <= 0 else -u
    length = float(torch.linalg.vector_norm(x))
    if length == 0:  # at once: no scale is known but that of the gradient's fall
        assert found.curvature is not None
        bend = abs(float(found.curvature))
        slope = abs(float(g @ u))
        length = slope / bend if bend > 0 else 1.0
        length = min(length, max(1.0, slope))
    d = x + length * downhill
    if float(g @ d) > 0:
        d = length * downhill
    return d, float(g @ d + d @ (A @ d) / 2)
