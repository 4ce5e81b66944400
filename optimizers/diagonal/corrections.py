"""Bias corrections of averages that start at zero, from counters on the host or on the device.

An average a <- beta a + (1 - beta) x has taken the share 1 - beta^n of its observations after n of them, so that
a / (1 - beta^n) is unbiased. n counts observations: for curvature that is refreshed now and then, refreshes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from optimizers.diagonal.shell import State, Tensors
from optimizers.shared.base import Group

__all__ = ["bias_corrections", "step_sizes"]


def bias_corrections(counters: Tensors, beta: float, group: Group) -> list[Any]:
    """Return 1 - beta^n for every parameter, 1 where nothing was observed yet: numbers, or scalars on the device."""
    if not group["capturable"]:
        return [1.0 - beta**n if n > 0 else 1.0 for n in map(float, counters)]
    log_beta = math.log(beta) if beta > 0 else -math.inf  # 1 - beta^n in float32 would lose half of its digits
    return [torch.where(n > 0, -torch.expm1(n * log_beta), 1.0) for n in counters]


def step_sizes(group: Group, state: State, beta: float) -> list[Any]:
    """Return lr / (1 - beta^step) for every parameter, and 0 for those whose curvature was not measured yet."""
    pairs = zip(bias_corrections(state["step"], beta, group), state["hessian_step"], strict=True)
    if not group["capturable"]:
        return [group["lr"] / c if float(n) > 0 else 0.0 for c, n in pairs]
    return [group["lr"] / c * (n > 0) for c, n in pairs]
