"""Stochastic line search: gradient steps that lower the loss of their own mini-batch enough.

Reference: Vaswani, Mishkin, Laradji, Schmidt, Gidel and Lacoste-Julien (2019), Painless stochastic gradient:
interpolation, line-search, and convergence rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.engine.repeated_evaluation import RepeatedEvaluation
from curvature.errors import InputError, NonFiniteError
from curvature.objective.shards import is_part, mesh_group
from optimizers.newton.line_search import LineSearchResult
from optimizers.shared.base import Common, Group
from optimizers.shared.closures import backward_of, loss_of
from optimizers.shared.gradient_steps import GradientOptimizer
from optimizers.shared.gradients import all_zero, local, refuse_gradients, refuse_sparse
from optimizers.shared.ranks import average_over_ranks, compare_ranks, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SLS"]

Closure = Callable[[], Any]


class SLS(GradientOptimizer):
    """SGD that finds its own step length: the largest that lowers the loss of the mini-batch enough.

        eta <- shrink eta until f(theta - eta lr g) <= f(theta) - decrease eta lr |g|^2
        theta <- theta - eta lr g

    f is the loss of the closure's batch, g its gradient. Where the search starts is the `reset` rule of the paper:
    "grow" from the last step times growth^(1 / steps_per_epoch), "keep" from the last step, "restart" from `max_step`.
    The first search starts from eta = 1. Converges at SGD's best rates where one model is best for every batch
    (interpolation); where none is, steps do not shrink and the loss stays at the level of the batches' noise. On
    separable data the logistic loss has no minimum: there SGD is faster the larger its rate, through steps that raise
    the loss, which this search never takes.

        optimizer.step(closure)          # closure returns the loss, or (outputs, targets) where loss= was given

    The closure is evaluated several times a step and has to be the same function each time: random numbers (dropout)
    start over, running statistics are moved by the first evaluation only. One that calls `backward()` itself works and
    costs a gradient for every evaluation. A loss that is not finite counts as too large. Where no step of the search
    lowers the loss enough, parameters stay, `last_search` says so, and the next search goes on from there. Differences
    below rounding of the loss are taken as none.

    Cost: a gradient, and one evaluation of the loss for each eta tried: one or two a step by "grow" with
    `steps_per_epoch` given. Memory: a copy of the parameters.

    Ranks: with `process_group=`, needed under `DistributedDataParallel` too, loss and gradient are those of the joined
    batch. Parameters in parts (DTensors) are handed in as they are.

    Args:
        params: parameters or groups of them. The step length is one for all, and so are settings; `lr` may differ.
        lr: unit of step lengths. Schedulers move it.
        decrease: c of the Armijo condition.
        shrink: factor from one eta to the next.
        growth: by how much eta may grow in an epoch.
        steps_per_epoch: batches in an epoch, `len(loader)`. With 1, the default, eta starts a search `growth` times as
            large as it was: right for full batches, six more evaluations a step on small ones.
        reset: "grow", "keep" or "restart"; see above.
        max_step: largest eta. None: 10 where each search restarts from it, else 10^6, far beyond usual steps.
        max_evaluations: most values of the loss in a search.
        shared: maximize, check_finite, loss, process_group: see `optimizers.shared.base.Common`.

    Attributes:
        last_search: what the last search found: `step` (eta), `value` of the loss, `num_evaluations`, `success`.

    Raises:
        InputError: for settings out of range or that differ between groups, complex parameters, sparse gradients, steps
            without closure.
        NonFiniteError: if the loss or its gradient is not finite where a step starts.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SLS([w])
        >>> loss = optimizer.step(lambda: w.square().sum())  # 1 is too long; the longest allowed is .9
        >>> round(optimizer.last_search.step, 2), optimizer.last_search.num_evaluations
        (0.9, 2)
    """

    _kept = (*GradientOptimizer._kept, "last_search")
    _takes_parts = True
    _late_settings: ClassVar[dict[str, Any]] = {
        **{"maximize": False, "seed": 0, "decrease": 0.1, "shrink": 0.9, "growth": 2.0, "steps_per_epoch": 1},
        **{"reset": "grow", "max_step": None, "max_evaluations": 100, "step_size": 0.0, "failed": False},
    }
    _least: ClassVar[dict[str, float]] = {"growth": 1.0}
    _counts = ("steps_per_epoch", "max_evaluations")
    _fractions = ("decrease", "shrink")
    _positive = ("decrease", "shrink", "growth")
    _alike = (*GradientOptimizer._alike, "maximize", *_positive, "max_step", *_counts, "reset")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"reset": ("grow", "keep", "restart")}
    last_search: LineSearchResult | None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        decrease: float = 0.1,
        shrink: float = 0.9,
        growth: float = 2.0,
        steps_per_epoch: int = 1,
        reset: Literal["grow", "keep", "restart"] = "grow",
        max_step: float | None = None,
        max_evaluations: int = 100,
        check_finite: bool = True,
        **shared: Unpack[Common],
    ) -> None:
        defaults: Group = {"lr": lr, "decrease": decrease, "shrink": shrink, "growth": growth, "reset": reset}
        defaults |= {"steps_per_epoch": steps_per_epoch, "max_step": max_step, "max_evaluations": max_evaluations}
        self.last_search = None
        super().__init__(params, defaults, check_finite=check_finite, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        most = group["max_step"]
        number = isinstance(most, (int, float)) and not isinstance(most, bool)
        if most is not None and not (number and 0 < most < math.inf):
            raise InputError(f"max_step must be None or positive and finite, got {most!r}.")

    def _move(self) -> None:
        """Steps are taken by the search."""

    @on_all_ranks
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the closure's loss before it, detached."""
        params = self._trained()
        self._refuse_unlike(*self.param_groups)
        if closure is None:
            # a checkpoint is loaded into an optimizer that was stepped with zero gradients and without closure
            if all_zero([local(p.grad) for p in params if p.grad is not None]):
                self._count([p for p in params if p.grad is not None])
                return None
            raise InputError("SLS evaluates the loss several times a step: call step(closure).")
        repeated = RepeatedEvaluation(params)
        before, done = [p.clone() for p in params], False
        try:
            with repeated.watched(), self._no_wrapper_alone():
                with repeated.evaluation():
                    loss, *of_batch = backward_of(closure, params, self.loss)
                share = 1.0 if of_batch[0] is None or self.process_group is None else share_of_rank(self, *of_batch)
                self._synchronize(share)
                self._look_for_gradients(computed=isinstance(loss, Tensor), old=False)
                moved = [(p, x, p.grad) for p, x in zip(params, before, strict=True) if p.grad is not None]
                refuse_sparse((g for *_, g in moved), "SLS")
                if moved:
                    self._search(loss, share, lambda: repeated.call(closure), moved)
                done = True
        finally:
            if not done:
                for p, x in zip(params, before, strict=True):
                    p.copy_(x)
            repeated.finish(keep=done)
        self._count([p for p, *_ in moved])
        return loss

    def _search(self, loss: Any, share: float, evaluate: Closure, moved: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Move parameters by the longest step that passes, and leave the gradients at the start in `.grad`."""
        settings = self.param_groups[0]
        sign = -1.0 if settings["maximize"] else 1.0
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        if self.check_finite:
            refuse_gradients([p for p, *_ in moved], "SLS")
        start = sign * self._mean(loss, share)
        if not math.isfinite(start):
            raise NonFiniteError(f"the loss is {sign * start}: parameters are left as they are. Look at the batch.")
        slope = sum(rates[id(p)] * _squared_norm(g) for p, _, g in moved)
        if slope == 0:  # nothing can move, and eta stays as it was
            self.last_search = LineSearchResult(0.0, sign * start, 0, True, "no gradient")
            return
        noise = torch.finfo(loss.dtype).eps * abs(start) if isinstance(loss, Tensor) else 0.0
        step, tried = self._first_step(settings), 0
        while tried < settings["max_evaluations"]:
            for p, x, g in moved:
                p.grad = None  # a closure that calls backward() must not write to the gradient at the start
                p.copy_(x)
                local(p).add_(local(g, like=p), alpha=-sign * step * rates[id(p)])
            returned = evaluate()
            value = sign * self._mean(returned if _is_number(returned) else loss_of(returned, self.loss)[0], share)
            tried += 1
            if value <= start - settings["decrease"] * step * slope + noise:
                self.last_search = LineSearchResult(step, sign * value, tried, True, "sufficient decrease")
                break
            step *= settings["shrink"]
        else:
            for p, x, _ in moved:
                p.copy_(x)
            message = f"no sufficient decrease down to a step of {step:.2g}"
            self.last_search = LineSearchResult(0.0, sign * start, tried, False, message)
        for p, _, g in moved:
            p.grad = g
        settings["step_size"], settings["failed"] = step, not self.last_search.success

    def _first_step(self, settings: Group) -> float:
        last, most, restarts = settings["step_size"], settings["max_step"], settings["reset"] == "restart"
        if most is None:
            most = 10.0 if restarts else 1e6
        if last == 0:
            last = 1.0
        elif not settings["failed"] and restarts:
            last = most
        elif not settings["failed"] and settings["reset"] == "grow":
            last *= settings["growth"] ** (1 / settings["steps_per_epoch"])
        return float(min(last, most))

    def _mean(self, value: Any, share: float) -> float:
        """Return a loss, the mean of it over the ranks that hold parts of the batch or of the parameters."""
        part = next((p for p in self._trained() if is_part(p)), None)
        group = self.process_group if part is None else self.process_group or mesh_group(part.device_mesh)  # type: ignore[attr-defined]
        if group is None:
            return float(value)
        if self.process_group is not None:
            compare_ranks(self, "a loss of the search")
        mine = torch.as_tensor(float(value), dtype=torch.float64, device=local(self._trained()[0]).device)
        return float(average_over_ranks([mine], group, share)[0])

    def _count(self, params: list[Tensor]) -> None:
        for p in params:
            self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32))
            self.state[p]["step"] += 1


def _squared_norm(g: Tensor) -> float:
    square: Any = g.to(torch.promote_types(g.dtype, torch.float32)).square().sum()
    return float(square.full_tensor() if is_part(square) else square)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
