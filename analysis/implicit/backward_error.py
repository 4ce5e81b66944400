"""Does SGD follow the flow that backward error analysis says it does, and up to which learning rate?

An epoch of SGD is run in several orders of the batches; the mean iterate is compared with three flows run for the same
time m lr, integrated to an error far below the distances: of C, of C + lr/4 |grad C|^2, and of C + lr/4 (1/m) sum_k
|grad C_k|^2. For small lr the distances fall as lr^2, lr^2 and lr^3.

That holds for losses with three derivatives. With ReLU, maximum pooling and their like the orders are lost: steps cross
kinks, where neither the expansion nor the integrator's order holds. Replace them (by tanh, GELU, softplus, mean
pooling) for this test; the result's `notes` name those that were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from analysis.implicit.measure import penalty_gradients
from analysis.implicit.results import BackwardError
from analysis.implicit.smoothness import smoothness_note
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError, NonFiniteError
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import shifted

__all__ = ["MOST_ENUMERATED", "backward_error"]

MOST_ENUMERATED = 6  # batches; 7! orders take 13 699 gradients

Orders = Literal["all", "reverse", "single"]
Field = Callable[[Tensor], Tensor]


@in_whole_vectors
@full_precision
@checked
def backward_error(
    objective: Objective,
    *,
    lrs: Sequence[float],
    orders: Orders = "reverse",
    num_epochs: int = 1,
    num_steps: int = 6,
) -> BackwardError:
    """Return the distances of SGD's mean iterate from the flows of C and of both modified losses.

    The theory is of the mean over all orders; the mean of one order and its reverse has the same second-order term
    (each pair of batches is met both ways) at the price of two epochs. Flows are integrated by the Runge-Kutta method
    of order 4, twice, with n and n/2 steps an epoch.

    Cost: m gradients of single batches an order ("all" shares common beginnings), and for each rate and modified flow
    6 `num_steps` times m gradients and two Hessian products a batch. The model's parameters are put back, bit for bit.

    Args:
        objective: in float64, since distances are small differences, and smooth; its batches are those of SGD, counted
            alike.
        lrs: at least one, positive.
        orders: "all" (up to 6 batches), "reverse" or "single" (which shows that the mean is needed).
        num_epochs: more than one only for an objective of one batch, where there is one order.
        num_steps: of the integrator, in an epoch; even.

    Raises:
        InputError: for an objective that is not in float64, too many batches to enumerate, a number of epochs other
            than 1 with several batches, and settings out of range.

    Reference: Smith, Dherin, Barrett and De (2021), eq. 19; Barrett and Dherin (2020), theorem 3.1; for the integrator
    Hairer, Lubich and Wanner (2006), Geometric numerical integration.
    """
    rates = sorted(float(lr) for lr in lrs)
    _validate(objective, rates, orders, num_epochs, num_steps)
    batches = [
        objective.replace(data=[batch], keep_graphs=False, micro_batch=None, seed=seed)
        for seed, batch in enumerate(objective.batches(), start=objective.settings["seed"])
    ]
    m = len(batches)
    if orders == "all" and m > MOST_ENUMERATED:
        raise InputError(f"all orders of {m} batches are too many, at most {MOST_ENUMERATED}; pass orders='reverse'.")
    if num_epochs > 1 and m > 1:
        raise InputError(f"num_epochs must be 1 with {m} batches, whose orders multiply, got {num_epochs}.")
    pieces = objective.replace(keep_graphs=False)
    start = torch.cat([t.detach().reshape(-1) for t in objective.space.tensors.values()])
    spent = 0

    def gradient_of(k: int, theta: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        with shifted(pieces, theta):
            return batches[k].gradient()

    def mean_gradient(theta: Tensor) -> Tensor:
        return sum((gradient_of(k, theta) for k in range(m)), torch.zeros_like(theta)) / m

    def field(lr: float, *, noise: bool) -> Field:
        def bent(theta: Tensor) -> Tensor:
            nonlocal spent
            spent += 6 * m
            with shifted(pieces, theta):
                of_full, of_batch, g = penalty_gradients(pieces)
            return -(g + lr / 4 * (of_full + of_batch if noise else of_full))

        return bent

    rows = []
    for lr in rates:
        try:
            mean = _mean_iterate(gradient_of, start, m, lr, orders, num_epochs)
            time, ends = num_epochs * m * lr, []
            for flow in (lambda t: -mean_gradient(t), field(lr, noise=False), field(lr, noise=True)):
                fine = _runge_kutta(flow, start, time, num_epochs * num_steps)
                coarse = _runge_kutta(flow, start, time, num_epochs * num_steps // 2)
                ends.append((float((mean - fine).norm()), float((fine - coarse).norm()) / 15))
                if m == 1 and len(ends) == 2:  # one batch has no noise: both modified flows are the same
                    ends.append(ends[1])
                    break
            rows.append([*(end for end, _ in ends), float((mean - start).norm()), max(e for _, e in ends)])
        except NonFiniteError:  # the run or a flow left the range of numbers: no theory holds there
            rows.append([torch.inf] * 4 + [torch.nan])
    table = torch.tensor(rows, dtype=torch.float64)
    return BackwardError(
        lrs=torch.tensor(rates, dtype=torch.float64),
        num_batches=m,
        num_epochs=num_epochs,
        num_orders=_count(m, orders),
        orders=orders,
        to_loss=table[:, 0],
        to_full=table[:, 1],
        to_modified=table[:, 2],
        moved=table[:, 3],
        integrator_error=table[:, 4],
        num_gradients=spent,
        notes=smoothness_note(objective, "orders in lr"),
    )


def _count(m: int, orders: Orders) -> int:
    if m == 1 or orders == "single":
        return 1
    return int(torch.arange(1, m + 1).prod()) if orders == "all" else 2


def _mean_iterate(
    gradient_of: Callable[[int, Tensor], Tensor], start: Tensor, m: int, lr: float, orders: Orders, num_epochs: int
) -> Tensor:
    """Return the mean over orders of the iterate after an epoch."""
    total, count = torch.zeros_like(start), 0

    def walk(theta: Tensor, left: tuple[int, ...]) -> None:
        nonlocal total, count
        if not left:
            total, count = total + theta, count + 1
            return
        for k in left:
            walk(theta - lr * gradient_of(k, theta), tuple(j for j in left if j != k))

    if orders == "all" and m > 1:
        walk(start, tuple(range(m)))
        return total / count
    forward = list(range(m)) * num_epochs
    runs = [forward, forward[::-1]] if orders == "reverse" and m > 1 else [forward]
    for run in runs:
        theta = start
        for k in run:
            theta = theta - lr * gradient_of(k, theta)
        total, count = total + theta, count + 1
    return total / count


def _runge_kutta(field: Field, theta: Tensor, time: float, steps: int) -> Tensor:
    """Integrate theta' = field(theta) by the classical method of order 4."""
    h = time / steps
    for _ in range(steps):
        a = field(theta)
        b = field(theta + h / 2 * a)
        c = field(theta + h / 2 * b)
        d = field(theta + h * c)
        theta = theta + h / 6 * (a + 2 * b + 2 * c + d)
    return theta


def _validate(objective: Objective, rates: list[float], orders: str, num_epochs: int, num_steps: int) -> None:
    if any(t.dtype != torch.float64 for t in objective.space.tensors.values()):
        raise InputError("distances are small differences: call model.double() and pass data in float64.")
    if not rates or not all(0 < lr < float("inf") for lr in rates):
        raise InputError(f"lrs must be one or more positive numbers, got {rates}.")
    if orders not in ("all", "reverse", "single"):
        raise InputError(f"orders must be 'all', 'reverse' or 'single', got {orders!r}.")
    if num_epochs < 1 or num_steps < 2 or num_steps % 2:
        raise InputError(f"num_epochs must be at least 1, num_steps even and positive, got {num_epochs}, {num_steps}.")
    if objective.process_group is not None:
        raise InputError("the batches of an epoch must lie on one rank; measure on a single one.")
