"""COCOB: step lengths from betting on the signs of gradients, with no learning rate.

Reference: Orabona and Tommasi (2017), Training deep networks without learning rates through coin betting, algorithms 1
(with `bound`) and 2 (without).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.first_order.shell import Elementwise, ElementwiseCommon, States
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["COCOB"]


class COCOB(Elementwise):
    """Steps without a learning rate: each entry bets a share of what it has won on the sign of its next gradient.

    For every entry, with w1 where it began and g the gradient:

        L <- max(L, |g|)           G <- G + |g|           theta <- theta - g
        R <- max(R - (w - w1) g, 0)                                                    what was won
        w <- w1 + theta / (L max(G + L, alpha L)) (L + R)

    The first step is 1 / alpha, whatever the scale of the gradient; steps grow exponentially while signs agree. No
    entry can lose more than L. With `bound`, which no |g| exceeds, it is the paper's algorithm 1 for convex losses:

        w <- w1 + tanh(theta / (G + L)) (L + R) / L          G begins with L = bound, R may fall to -L

    and after T steps the mean of the losses is above that of any w* by at most

        (1 / T) sum_i [L + |w*_i - w1_i| (L (G_i + L) ln(1 + (G_i + L)^2 (w*_i - w1_i)^2 / L^2))^(1/2)].

    Distances are measured in the units of the parameters: a network whose weights have to travel far from their start
    in small units, or whose gradients change sign at every batch, is served late.

    Cost: elementwise work. Memory: five averages, more than Adam's two.

    How to take steps, ranks, models in parts: see `optimizers.first_order.shell.Elementwise`: `loss.backward()` and
    `step()`, or `step(closure)`.

    Args:
        params: parameters or groups of them.
        lr: share of the way to the next bet that is gone, in [0, 1]. 1 is the method; schedulers that lower it end with
            parameters that stand still.
        alpha: the first step is 1 / alpha; the bets are small until alpha times the largest gradient was seen.
        bound: largest gradient that can occur, per entry; None estimates it as above.
        shared: maximize, foreach, check_finite, loss, process_group.

    Raises:
        InputError: for settings out of range, complex parameters, sparse gradients, and gradients beyond `bound`.
        NonFiniteError: for gradients that are not finite, unless check_finite=False; nothing has moved then.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -3000.0]))
        >>> optimizer = COCOB([w])
        >>> loss = optimizer.step(lambda: w.square().sum())
        >>> w.detach()
        tensor([ 9.9000e-01, -3.0000e+03])
    """

    _late_settings: ClassVar[dict[str, Any]] = {**Elementwise._late_settings, "alpha": 100.0, "bound": None}
    _positive = ("alpha",)
    _averages = ("start", "largest", "total", "reward", "theta")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        alpha: float = 100.0,
        bound: float | None = None,
        **shared: Unpack[ElementwiseCommon],
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "bound": bound}, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if float(group["lr"]) > 1:
            raise InputError(
                f"COCOB's lr is the share of the way to the next bet, in [0, 1], got {float(group['lr']):g}; longer "
                "first steps have a smaller alpha."
            )
        bound = group["bound"]
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if bound is not None and not (number and 0 < bound < math.inf):
            raise InputError(f"bound must be None or positive and finite, got {bound!r}.")

    def _begin(self, group: Group, at: tuple[Tensor, Tensor], state: dict[str, Tensor]) -> None:
        state["start"].copy_(at[0])
        for name in ("largest", "total"):
            state[name].fill_(0.0 if group["bound"] is None else group["bound"])

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        starts, largest, totals, rewards, thetas = (states[name] for name in self._averages)
        bound, alpha = group["bound"], group["alpha"]
        sizes = torch._foreach_abs(grads)
        if bound is not None:
            _refuse_beyond(sizes, bound)
        torch._foreach_maximum_(largest, sizes)
        torch._foreach_add_(totals, sizes)
        torch._foreach_sub_(thetas, grads)
        won = torch._foreach_sub(params, starts)
        torch._foreach_addcmul_(rewards, won, grads, -1.0)
        if bound is None:
            torch._foreach_clamp_min_(rewards, 0.0)
        for p, start, L, G, R, theta in zip(params, starts, largest, totals, rewards, thetas, strict=True):
            if bound is None:
                size = L.masked_fill(L == 0, 1.0)  # no gradient yet: theta is 0
                bet = (theta / size) * ((L + R) / torch.maximum(G + size, alpha * size))
            else:
                bet = torch.tanh(theta / (G + L)) * ((L + R) / L)
            p.lerp_(start + bet, group["lr"])


def _refuse_beyond(sizes: Any, bound: float) -> None:
    filled = [s for s in sizes if s.numel() > 0]
    found = max((float(s.max()) for s in filled), default=0.0)
    if found > bound:
        raise InputError(
            f"a gradient has an entry of {found:.3g}, beyond bound = {bound:g}: the regret bound would not hold and "
            "more than all could be lost. Give the true bound, clip gradients by value, or leave bound out."
        )
