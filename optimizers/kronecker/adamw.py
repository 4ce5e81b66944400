"""AdamW inside of matrix optimizers, for vectors, scalars and what else the method does not take: torch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from optimizers.shared.base import Group
from optimizers.shared.gradients import local

__all__ = ["adamw", "adamw_state"]


def adamw_state(p: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state at its start: averages in float32 or wider, in parts where the parameter is."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    averages = {name: torch.zeros_like(p, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32), **averages}


def adamw(group: Group, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    """Take AdamW's step on parameters that have a gradient; each rank on its part of those in parts.

    Parameters of low precision are moved in float32 and rounded once.
    """
    if not params:
        return
    beta1, beta2 = group["betas"] if group["adamw_betas"] is None else group["adamw_betas"]
    ms, vs = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
    own = [local(p) for p in params]
    wide = [p.to(average.dtype) for p, average in zip(own, ms, strict=True)]
    grads = [local(p.grad, like=p).to(w.dtype) for p, w in zip(params, wide, strict=True) if p.grad is not None]
    torch_adamw(
        wide,
        grads,
        ms,
        vs,
        [],
        [state["step"] for state in states],
        foreach=group["foreach"] is not False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"] * group["adamw_scale"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for p, w in zip(own, wide, strict=True):
        if p is not w:
            p.copy_(w)
