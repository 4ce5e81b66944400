"""Yogi: Adam with a second average that changes by steps of the size of the squared gradient.

Reference: Zaheer, Reddi, Sachan, Kale and Kumar (2018), Adaptive methods for nonconvex optimization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.first_order.shell import Elementwise, ElementwiseCommon, States
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Yogi"]


class Yogi(Elementwise):
    """Adam whose second average falls slowly where gradients become small.

        m <- beta1 m + (1 - beta1) g
        v <- v - (1 - beta2) sign(v - g^2) g^2             Adam: v - (1 - beta2) (v - g^2)
        theta <- theta - lr (m / (v^(1/2) + eps) + weight_decay theta)

    Where g^2 is far below v, Adam forgets v at the rate 1 - beta2 whatever g is, so that its step length can jump; here
    v falls by (1 - beta2) g^2. A spike of the gradient lifts v as it does Adam's and is not forgotten: after one of a
    million times the usual size the parameters stand still for good. As in the paper neither average is corrected for
    its start, so that the first step is (1 - beta1) lr.

    Cost: elementwise work. Memory: two averages.

    How to take steps, ranks, models in parts: see `optimizers.first_order.shell.Elementwise`: `loss.backward()` and
    `step()`, or `step(closure)`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added to the denominator; the paper's is 1e-3, far more than Adam's.
        weight_decay: decoupled, times lr.
        initial: what v begins with; None, as in the paper's experiments, takes the square of the first gradient.
        shared: maximize, foreach, check_finite, loss, process_group.

    Raises:
        InputError: for settings out of range, complex parameters, sparse gradients.
        NonFiniteError: for gradients that are not finite, unless check_finite=False; nothing has moved then.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = Yogi([w], lr=0.1, eps=0.0)
        >>> loss = optimizer.step(lambda: w.square().sum())
        >>> w.detach()
        tensor([ 0.9900, -2.9900])
    """

    _late_settings: ClassVar[dict[str, Any]] = {**Elementwise._late_settings, "initial": None}
    _least: ClassVar[dict[str, float]] = {"eps": 0.0, "weight_decay": 0.0}
    _averages = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        initial: float | None = None,
        **shared: Unpack[ElementwiseCommon],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "initial": initial}
        super().__init__(params, defaults, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        initial = group["initial"]
        number = isinstance(initial, (int, float)) and not isinstance(initial, bool)
        if initial is not None and not (number and 0 <= initial < float("inf")):
            raise InputError(f"initial must be None or a finite number >= 0, got {initial!r}.")

    def _begin(self, group: Group, at: tuple[Tensor, Tensor], state: dict[str, Tensor]) -> None:
        initial, (p, grad) = group["initial"], at
        state["exp_avg_sq"].copy_(grad * grad if initial is None else torch.full_like(p, initial))

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        (beta1, beta2), averages, squares = group["betas"], states["exp_avg"], states["exp_avg_sq"]
        now = torch._foreach_mul(grads, grads)
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        signs = torch._foreach_sub(squares, now)
        torch._foreach_sign_(signs)
        torch._foreach_addcmul_(squares, signs, now, beta2 - 1)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        # 0 / 0 where there was no gradient yet and eps = 0
        steps = [m / r.masked_fill(r == 0, 1.0) for m, r in zip(averages, roots, strict=True)]
        torch._foreach_add_(params, steps, alpha=-group["lr"])
