"""Bias corrections of averages that start at zero, from counters on the host or on the device.

An average a <- beta a + (1 - beta) x has taken the share 1 - beta^n of its observations after n of them, so that
a / (1 - beta^n) is unbiased. n counts observations: for curvature that is refreshed now and then, refreshes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["bias_corrections", "scalar_lr", "step_sizes"]


def bias_corrections(states: list[dict[str, Tensor]], counter: str, beta: float, *, capturable: bool) -> list[Any]:
    """Return 1 - beta^n for every parameter, 1 where nothing was observed yet: numbers, or scalars on the device."""
    if not capturable:
        return [1.0 - beta**n if n > 0 else 1.0 for n in (float(state[counter]) for state in states)]
    log_beta = math.log(beta) if beta > 0 else -math.inf  # 1 - beta^n in float32 would lose half of its digits
    shares = [-torch.expm1(state[counter] * log_beta) for state in states]
    return [torch.where(state[counter] > 0, share, 1.0) for share, state in zip(shares, states, strict=True)]


def step_sizes(
    lr: float | Tensor, corrections: list[Any], states: list[dict[str, Tensor]], *, capturable: bool
) -> list[Any]:
    """Return lr / correction for every parameter, and 0 for those whose curvature was not measured yet."""
    if not capturable:
        return [lr / c if float(s["hessian_step"]) > 0 else 0.0 for c, s in zip(corrections, states, strict=True)]
    return [lr / c * (s["hessian_step"] > 0) for c, s in zip(corrections, states, strict=True)]


def scalar_lr(group: dict[str, Any]) -> float | Tensor:
    """Return a group's learning rate as a number, or as the tensor it is where nothing may wait for the device."""
    lr = group["lr"]
    return lr if group["capturable"] or not isinstance(lr, Tensor) else lr.item()
