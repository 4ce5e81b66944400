"""An optimizer whose update rule is a small network that was trained on digits.

References: Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent; Metz, Freeman,
Harrison, Maheswaranathan and Sohl-Dickstein (2022), Practical tradeoffs between memory, compute, and performance in
learned optimizers (a network for each entry and what it sees; evolution strategies).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizers.first_order.shell import Elementwise, ElementwiseCommon, States
from optimizers.learned.network import DECAYS, SQUARES, WEIGHTS, load_weights, update
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LearnedOptimizer"]


class LearnedOptimizer(Elementwise):
    """A learned update rule: no learning rate to tune, and no promise outside of what it was trained on.

        theta <- theta - lr exp(s) (m_.9 / v_.99^(1/2) + d)

    m and v are averages of the gradient and its square, corrected for their start; s and d the answers of a network
    of 16 units for every entry. It sees the gradient and its averages over 2, 10 and 100 steps over v^(1/2), the weight
    and its v beside those of the tensor, the tensor's size and shape, and how much of the training is left. With s
    constant and d = 0 it is Adam.

    The network was trained on trainings of 50 to 150 steps of small fully connected and convolutional networks on
    8 x 8 digits, batches of 16 to 64, cross-entropy. On such tasks, of none of which it was trained, it ends lower than
    Adam with its best rate; on longer trainings, larger networks and other losses it may be far worse. The page on
    races (`docs/how_to/race.md`) has figures for both. `python -m benchmarks.learned.train` in the repository trains
    one.

    Cost: about 800 flops an entry and step, in some fifty passes over the parameters. Memory: five averages.

    How to take steps, ranks: see `optimizers.first_order.shell.Elementwise`: `loss.backward()` and `step()`, or
    `step(closure)`.

    Args:
        params: parameters or groups of them.
        num_steps: that the training will take; the rule depends on how many are left. Further ones are as the last.
        lr: factor on every step; 1 is the rule as it was trained.
        weights: a file that `benchmarks.learned.train` wrote; None takes the one of the package.
        shared: maximize, foreach, check_finite, loss, process_group.

    Raises:
        InputError: for settings out of range, complex parameters, parameters in parts, sparse gradients, and files that
            hold no such weights.
        NonFiniteError: for gradients that are not finite, unless check_finite=False; nothing has moved then.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = LearnedOptimizer([w], num_steps=100)
        >>> for _ in range(100):
        ...     loss = optimizer.step(lambda: w.square().sum())
        >>> bool(loss < 1.0)
        True
    """

    _takes_parts = False  # it sees whole tensors
    _kept = (*Elementwise._kept, "weights")
    _counts = ("num_steps",)
    _averages = (*[f"exp_avg_{decay}" for decay in DECAYS], *[f"exp_avg_sq_{decay}" for decay in SQUARES])

    def __init__(
        self,
        params: Any,
        num_steps: int,
        lr: float | Tensor = 1.0,
        *,
        weights: Path | str | None = None,
        **shared: Unpack[ElementwiseCommon],
    ) -> None:
        self.weights = load_weights(WEIGHTS if weights is None else weights)
        super().__init__(params, {"lr": lr, "num_steps": num_steps}, **shared)

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        kept = [states[name] for name in self._averages]
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if p.numel() == 0:
                continue
            averages = [tensors[i] for tensors in kept]
            flat = [average.reshape(1, -1) for average in averages]
            change, means, squares = update(
                self.weights.to(p.device, p.dtype)[None],
                p.reshape(1, -1),
                g.reshape(1, -1),
                flat[: len(DECAYS)],
                flat[len(DECAYS) :],
                shape=tuple(p.shape),
                step=int(states["step"][i]),
                num_steps=group["num_steps"],
            )
            torch._foreach_copy_(averages, [new.view(p.shape) for new in (*means, *squares)])
            p.add_(change.view(p.shape), alpha=group["lr"])
