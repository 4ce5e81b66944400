"""Training with an explicit penalty on gradient norms: what SGD's steps do by themselves, asked for by name.

The gradient of |g|^2 is a Hessian product, 2 H g, and there are three ways to it: differentiate the penalty through the
graph of the gradients; multiply by the Hessian, one batch's graph at a time; take the difference of two gradients a
small step apart, which needs no graph of a graph (Geiping et al. 2021).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.autograd.guards import refuse_undifferentiable
from curvature.data.random_states import RandomStates
from curvature.engine.repeated_evaluation import RunningBuffers
from curvature.errors import InputError, NonFiniteError
from curvature.results.record import Result
from optimizers.shared.ranks import refuse_wrapper

__all__ = ["GradientPenalty", "Kind", "Mode", "PenalisedStep"]

Kind = Literal["full", "batch", "variance"]
Mode = Literal["double_backward", "hessian_product", "finite_difference"]
Grads = list[Tensor]


@dataclass(frozen=True, kw_only=True, repr=False)
class PenalisedStep(Result):
    """What one step descended."""

    loss: float
    """Mean of the closures' losses, without the penalty."""
    penalty: float
    """Strength times the penalty; loss."""
    num_gradients: int
    """Gradients of single batches that were taken, a Hessian product counted as two."""


_ALONE = "Call its module, and average .grad between `gradients` and the optimizer's step: each rank penalises its own."


class GradientPenalty:
    """Adds the gradient of a penalty on gradient norms to what an optimizer steps along.

    With C_k the loss of closure k, m of them, and g the mean of their gradients g_k, the step descends the mean of C_k
    plus `strength` times

        full        |g|^2
        batch       (1/m) sum_k |g_k|^2
        variance    (1/m) sum_k |g_k - g|^2, the difference of these two.

    `strength` = lr / 4 is what SGD of learning rate lr and m batches adds to the loss by itself.

    Cost of a step, in gradients of a batch: "double_backward" and "hessian_product" 3 a batch ("full" and "variance" by
    products 4, since g must be known first); "finite_difference" 2.
    Memory: "double_backward" holds the graphs of all batches at once for "full" and "variance"; the others one.

    Closures are called anew for each gradient that is taken, under the random state that they were first called with,
    so that dropout has one mask a step. Buffers that a forward pass writes (running statistics) move in the first call
    alone.

    Args:
        optimizer: any whose `step()` reads `.grad`; state, schedules and parameter groups stay its own.
        strength: of the penalty, not negative; parameter^2 / loss.
        kind: which penalty.
        mode: how its gradient is computed. Finite differences are for smooth models.
        reach: relative step of the finite difference; default the root of the dtype's epsilon. Error O(reach).

    Raises:
        InputError: for settings that are not among these.

    Reference: Geiping, Goldblum, Pope, Moeller and Goldstein (2021), Stochastic training is not necessary for
    generalization, section 3.3; Smith et al. (2021), section 3.

    Examples:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> penalty = GradientPenalty(torch.optim.SGD([w], lr=0.1), strength=0.5)
        >>> penalty.step(lambda: (w**2).sum()).penalty  # g = 2 w, so |g|^2 / 2 = 2 w^2
        2.0
        >>> w.grad  # 2 w + 4 w
        tensor([6.])
    """

    @checked
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        strength: float,
        kind: Kind = "full",
        mode: Mode = "hessian_product",
        reach: float | None = None,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise InputError(f"strength must be finite and not negative, got {strength}.")
        if kind not in get_args(Kind) or mode not in get_args(Mode):
            raise InputError(
                f"kind must be one of {get_args(Kind)} and mode of {get_args(Mode)}, got {kind!r}, {mode!r}."
            )
        if reach is not None and not 0 < reach < 1:
            raise InputError(f"reach must lie between 0 and 1, got {reach}.")
        self.optimizer = optimizer
        self.strength = strength
        self.kind = kind
        self.mode = mode
        self.reach = reach

    def step(self, closures: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]) -> PenalisedStep:
        """Set `.grad` to the gradient of loss and penalty, and let the optimizer step.

        Args:
            closures: return the loss of one batch each, and call no `backward`.

        Raises:
            InputError: without closures, or for one that returns no scalar with a graph.
            NonFiniteError: if a loss or the penalty is not finite; then no step is taken.
        """
        found = self.gradients(closures)
        self.optimizer.step()
        return found

    def gradients(self, closures: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]) -> PenalisedStep:
        """Do what `step` does, without the step."""
        work = _Work(self, [closures] if callable(closures) else list(closures))
        with torch.enable_grad():
            if self.strength == 0:
                gradient, extra, penalty = work.mean_gradient(), None, 0.0
            elif self.mode == "double_backward":
                gradient, extra, penalty = work.double_backward()
            else:
                gradient, extra, penalty = work.by_products()
        loss = sum(work.losses) / len(work.losses)
        if not (math.isfinite(loss) and math.isfinite(penalty)):
            raise NonFiniteError(f"loss {loss} and penalty {penalty} must be finite; lower lr or strength.")
        for i, p in enumerate(work.params):
            p.grad = gradient[i].detach() if extra is None else (gradient[i] + self.strength * extra[i]).detach()
        return PenalisedStep(loss=loss, penalty=self.strength * penalty, num_gradients=work.spent)


class _Work:
    """The gradients of one step."""

    def __init__(self, settings: GradientPenalty, closures: list[Callable[[], Tensor]]) -> None:
        if not closures:
            raise InputError("closures must not be empty; pass one for each batch.")
        self.settings, self.closures = settings, closures
        self.params = [p for group in settings.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.losses: list[float] = []
        self.spent = 0
        self._states: dict[int, RandomStates] = {}
        self._buffers = [RunningBuffers() for _ in closures]

    def loss(self, k: int) -> Tensor:
        """Return closure k's loss; from the second call on under the random state of the first, leaving no trace."""
        first = k not in self._states
        if first:
            self._states[k] = self._random_states()
        buffers, random = self._buffers[k], contextlib.nullcontext() if first else self._repeated(k)
        with buffers.watched(), buffers.evaluation(), random, refuse_wrapper("GradientPenalty", _ALONE):
            value = self.closures[k]()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError("a closure must return the loss, a tensor with one entry and its graph, and not backward.")
        if first:
            self.losses.append(float(value.detach()))
        return value.reshape(())

    @contextlib.contextmanager
    def _repeated(self, k: int) -> Iterator[None]:
        present = self._random_states()
        try:
            self._states[k].restore()
            yield
        finally:
            present.restore()

    def _random_states(self) -> RandomStates:
        return RandomStates({p.device for p in self.params})

    def gradient(self, k: int, *, create_graph: bool = False) -> Grads:
        self.spent += 1
        return self._differentiate(self.loss(k), create_graph)

    def _differentiate(self, value: Tensor, create_graph: bool = False) -> Grads:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in self.params]
        if create_graph:
            refuse_undifferentiable([value])
        found = torch.autograd.grad(value, self.params, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.params, strict=True)]

    def mean_gradient(self) -> Grads:
        return _mean([self.gradient(k) for k in range(len(self.closures))])

    def double_backward(self) -> tuple[Grads, Grads, float]:
        m, kind = len(self.closures), self.settings.kind
        if kind == "batch":
            rows, pulls, penalty = [], [], 0.0
            for k in range(m):
                g = self.gradient(k, create_graph=True)
                square = _dot(g, g)
                pulls.append(self._differentiate(square))
                rows.append([part.detach() for part in g])
                penalty += float(square.detach()) / m
            self.spent += 2 * m
            return _mean(rows), _mean(pulls), penalty
        rows = [self.gradient(k, create_graph=True) for k in range(m)]
        mean = _mean(rows)
        if kind == "full":
            value = _dot(mean, mean)
        else:
            apart = [[a - b for a, b in zip(row, mean, strict=True)] for row in rows]
            value = torch.stack([_dot(row, row) for row in apart]).mean()
        self.spent += 2 * m
        return [part.detach() for part in mean], self._differentiate(value), float(value.detach())

    def by_products(self) -> tuple[Grads, Grads, float]:
        """Return what `double_backward` does from products H_k v with one batch's graph at a time."""
        m, kind = len(self.closures), self.settings.kind
        if kind == "batch":
            rows, pulls, penalty = [], [], 0.0
            for k in range(m):
                g, pull = self._product(k)
                rows.append(g)
                pulls.append(pull)
                penalty += float(_dot(g, g)) / m
            return _mean(rows), [2 * part for part in _mean(pulls)], penalty
        rows = [self.gradient(k) for k in range(m)]
        mean = _mean(rows)
        pulls = []
        if kind == "full":
            pulls, penalty = [self._product(k, mean, rows[k])[1] for k in range(m)], float(_dot(mean, mean))
        else:
            penalty = 0.0
            for k in range(m):
                apart = [a - b for a, b in zip(rows[k], mean, strict=True)]
                penalty += float(_dot(apart, apart)) / m
                pulls.append(self._product(k, apart, rows[k])[1])  # sum_k H_k (g_k - g) = sum_k H_k g_k - m H g
        return mean, [2 * part for part in _mean(pulls)], penalty

    def _product(self, k: int, v: Grads | None = None, known: Grads | None = None) -> tuple[Grads, Grads]:
        """Return g_k and H_k v, v = g_k by default."""
        if self.settings.mode == "hessian_product":
            g = self.gradient(k, create_graph=True)
            detached = [part.detach() for part in g]
            self.spent += 2
            return detached, self._differentiate(_dot(g, detached if v is None else v))
        g = self.gradient(k) if known is None else known
        v = g if v is None else v
        length = float(_dot(v, v)) ** 0.5
        if length == 0:
            return g, [torch.zeros_like(p) for p in self.params]
        eps = min(torch.finfo(p.dtype).eps for p in self.params) if self.settings.reach is None else 0.0
        reach = self.settings.reach if self.settings.reach is not None else eps**0.5
        step = reach * max(1.0, float(_dot(self.params, self.params).detach()) ** 0.5) / length
        kept = [p.data for p in self.params]
        try:
            for p, part in zip(self.params, v, strict=True):
                p.data = p.data + step * part
            there = self.gradient(k)
        finally:
            for p, data in zip(self.params, kept, strict=True):
                p.data = data
        return g, [(a - b) / step for a, b in zip(there, g, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _mean(rows: list[Grads]) -> Grads:
    return [torch.stack(list(parts)).mean(0) for parts in zip(*rows, strict=True)]
