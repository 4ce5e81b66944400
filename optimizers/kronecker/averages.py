"""A layer over the steps of a run: averages of its factors, and directions from averages of its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from optimizers.kronecker.factors import FactorSums, State, damped_inverses, eigenbases, solve
from optimizers.kronecker.layers import Layer
from optimizers.kronecker.shell import Routed
from optimizers.shared.base import Group

__all__ = ["FACTORS", "Member", "adam_members", "exchange", "fold", "layer_directions"]

_INVERSES = ("left_inverse", "right_inverse", "left_basis", "right_basis", "spread")
FACTORS = ("layer", "left", "right", "schedule", *_INVERSES)
"""State of a layer's main parameter, beside Adam's. `schedule` holds the weight that the average of the factors has
seen, the number of measurements, and the steps of the last measurement and of the last refresh."""


def fold(state: State, sums: FactorSums, group: Group, *, by_bases: bool) -> None:
    """Take a step's sums into the averages, and refresh what is made of these where that is due.

    The decay is per step: after k steps without measurement the old average counts beta^k. Averages are divided by the
    weight they have seen, so that their start at zero leaves no trace.

    Raises:
        NonFiniteError: if factors cannot be decomposed and there are none from before.
    """
    t = float(state["step"])
    schedule = state.setdefault("schedule", torch.zeros(4, dtype=torch.float64))
    seen, count, last, refreshed = schedule.tolist()
    decay = group["factor_beta"] ** (max(1.0, t - last) if count else 1.0)
    seen = seen * decay + 1 - decay
    for name, new in zip(("left", "right"), sums.product(), strict=True):
        if count:
            state[name].lerp_(new.to(state[name].dtype), (1 - decay) / seen)
        else:
            state[name] = new
    if sums.squares is not None and "spread" in state:
        state["spread"].lerp_(sums.squares.to(state["spread"].dtype), 1 - decay)
    count += 1
    every = group["refresh_every"]
    early = count < every and int(count) & (int(count) - 1) == 0
    if early or t - refreshed >= every or not refreshed:
        left, right = state["left"], state["right"]
        fresh = eigenbases(left, right) if by_bases else damped_inverses(left, right, group["damping"])
        if fresh is not None:
            for name in _INVERSES:
                state.pop(name, None)
            state.update(fresh)
            refreshed = t
        elif not refreshed:
            raise NonFiniteError(
                f"factors of sizes {left.shape[-1]} and {right.shape[-1]} cannot be decomposed: they are not finite, "
                "or overflow; lower lr, scale the inputs, or use a wider dtype."
            )
    schedule.copy_(torch.tensor([seen, count, t, refreshed], dtype=torch.float64))


def exchange(
    known: dict[int, Layer], seen: Iterable[Layer], refused: Iterable[int], states: Sequence[State]
) -> list[int]:
    """Take the layers of a step into those known, drop refused ones, and the factors of other parameters together.

    Args:
        known: place of a parameter -> its layer; changed.
        seen: in this step.
        refused: places of parameters without factors from here on.
        states: of all parameters, by place; changed.

    Returns:
        The places that belong to another layer than before.
    """
    new = {i: layer for layer in seen for i in layer.members}
    changed = [i for i, layer in new.items() if known.get(i) != layer] + [i for i in refused if i in known]
    for i in {*changed, *(j for k in changed if k in known for j in known[k].members)}:
        known.pop(i, None)
        for name in FACTORS:
            states[i].pop(name, None)
    known.update(new)
    return changed


@dataclass(frozen=True)
class Member:
    """A parameter of a layer in one step: its gradient, the average of it without bias, and Adam's direction."""

    grad: Tensor
    average: Tensor
    adam: Tensor
    state: State
    group: Group


def adam_members(routed: Routed) -> list[Member]:
    """Move Adam's averages of some parameters, and return what layers need of them."""
    group, states = routed.group, routed.states
    if not states:
        return []
    if any("exp_avg" not in state for state in states):
        raise InputError(
            "the state of a parameter holds no averages: it was saved on a rank that had none of its work. Save and "
            "load by torch.distributed.checkpoint, which takes those of all ranks."
        )
    (beta1, beta2), eps = group["betas"], group["eps"]
    m, v = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(m, routed.grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, routed.grads, routed.grads, 1 - beta2)
    steps = [float(state["step"]) for state in states]
    averages = torch._foreach_div(m, [1 - beta1**t for t in steps])
    roots = list(torch._foreach_div(v, [1 - beta2**t for t in steps]))
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    adam = torch._foreach_div(averages, roots)
    return [Member(*parts, group) for parts in zip(routed.grads, averages, adam, states, strict=True)]


def layer_directions(members: list[Member], group: Group) -> list[Tensor]:
    """Return the directions of a layer's parameters: its matrix of averages, preconditioned and grafted."""
    state = members[0].state
    groups, rows = state["left"].shape[:2]
    matrix = torch.cat([m.average.reshape(groups, rows, -1) for m in members], dim=2)
    solved = solve(matrix.to(state["left"].dtype), state, group["damping"]).to(matrix.dtype)
    if group["graft"] is not None:
        norm = torch.linalg.vector_norm(solved)
        if group["graft"] == "adam":
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([m.adam for m in members])))
        else:
            length = 0.2 * solved.numel() ** 0.5 * (norm > 0)
        solved = solved * (length / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    widths = [m.grad.numel() // (groups * rows) for m in members]
    return [p.reshape(m.grad.shape) for p, m in zip(solved.split(widths, dim=2), members, strict=True)]
