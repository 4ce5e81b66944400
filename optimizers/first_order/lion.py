"""Lion: the sign of an average of gradients.

Reference: Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu and Le (2023), Symbolic discovery of
optimization algorithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optimizers.first_order.shell import Elementwise, ElementwiseCommon, States
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion"]


class Lion(Elementwise):
    """Steps of one length in every entry, by the sign of an average of gradients.

        theta <- theta - lr (sign(beta1 m + (1 - beta1) g) + weight_decay theta)
        m <- beta2 m + (1 - beta2) g

    Every entry moves by lr, so a good lr is three to ten times smaller than AdamW's, and `weight_decay` as much larger.
    Entries whose average is exactly zero stay. The scale of the loss cancels.

    Cost: elementwise work. Memory: one average.

    How to take steps, ranks, models in parts: see `optimizers.first_order.shell.Elementwise`: `loss.backward()` and
    `step()`, or `step(closure)`.

    Args:
        params: parameters or groups of them.
        lr: how far every entry moves.
        betas: weight of the average in the direction, and its decay.
        weight_decay: decoupled, times lr.
        shared: maximize, foreach, check_finite, loss, process_group.

    Raises:
        InputError: for settings out of range, complex parameters, sparse gradients.
        NonFiniteError: for gradients that are not finite, unless check_finite=False; nothing has moved then.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = Lion([w], lr=0.1)
        >>> loss = optimizer.step(lambda: w.square().sum())
        >>> w.detach()
        tensor([ 0.9000, -2.9000])
    """

    _least: ClassVar[dict[str, float]] = {"weight_decay": 0.0}
    _averages = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **shared: Unpack[ElementwiseCommon],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **shared)

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        (beta1, beta2), averages = group["betas"], states["exp_avg"]
        directions = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - beta2)
