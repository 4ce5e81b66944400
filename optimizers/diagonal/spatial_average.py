"""Averages of a diagonal over the entries of one tensor that share a role: AdaHessian's spatial average.

A diagonal from one random probe is mostly noise. Entries of one convolution kernel, or neighbours in a row of a matrix,
have curvatures that are much alike, and their mean has a fraction of the noise. Which entries are averaged is the rule:

    rule               1-d    2-d                  3-d     4-d     5-d and more
    "paper"            as is  as is                kernel  kernel  kernel
    b, an integer      as is  blocks of b in rows  kernel  kernel  kernel
    "none", None       as is  as is                as is   as is   as is
    "official"         as is  as is                error   kernel  error
    "instruction"      as is  whole rows           kernel  kernel  error
    "fairseq"          as is  flat blocks of 32    error   error   error
    "davda54"          as is  as is                as is   as is   as is
    "torch_optimizer"  as is  as is                error   kernel  error
    "kozistr"          as is  as is                as is   as is   as is

A kernel is what the axes from the third on span, (out, in, spatial ...). "paper" is the integer rule with b = 1. The
names below "none" are public implementations in their default settings ("official" the authors' image code, "fairseq"
and "instruction" their code for translation and their tutorial); shapes they have no rule for are errors here. Whether
magnitudes or signed entries are averaged is up to the caller: the paper's formula has the entries of z * Hz, signed,
the authors' code their magnitudes.

Reference: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney (2021), AdaHessian: an adaptive second order optimizer for
machine learning, Algorithm 1 and the formula of its spatial average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvature.errors import InputError

__all__ = ["RULES", "spatial_average"]

RULES = ("paper", "none", "official", "instruction", "fairseq", "davda54", "torch_optimizer", "kozistr")

_FAIRSEQ_BLOCK = 32
_AS_IS = ("none", "davda54", "kozistr")
_COVERED = {  # dimensions of the tensors that a public implementation has a rule for
    "official": (0, 1, 2, 4),
    "torch_optimizer": (0, 1, 2, 4),
    "instruction": (0, 1, 2, 3, 4),
    "fairseq": (0, 1, 2),
}


def spatial_average(values: Tensor, rule: str | int | None = "paper") -> Tensor:
    """Return `values` with every entry replaced by the mean over its block, of the same shape, dtype and layout.

    Nothing waits for the device: what is averaged follows from the shape alone. Cost: one reduction and one copy; where
    the rule leaves a shape as it is, `values` itself is returned.

    Args:
        values: one parameter's diagonal, of the parameter's shape.
        rule: one of `RULES`, an integer b >= 1 or None, as in the table of the module.

    Raises:
        InputError: for rules that do not exist, for shapes a rule does not cover, and where b does not divide the
            length of a row.

    Examples:
        >>> spatial_average(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2)
        tensor([[2., 2., 7., 7.]])
    """
    known = rule is None or rule in RULES if not isinstance(rule, int) else rule >= 1 and not isinstance(rule, bool)
    if not known:
        raise InputError(f"rule must be one of {', '.join(RULES)}, an integer b >= 1 or None, got {rule!r}.")
    if rule is None or rule in _AS_IS:
        return values
    if rule in _COVERED and values.ndim not in _COVERED[rule]:
        raise InputError(
            f"the implementation {rule!r} has no rule for tensors of {values.ndim} dimensions, got shape "
            f'{tuple(values.shape)}; use "paper", which covers all.'
        )
    b, within = 1, values.numel()  # blocks lie in memory one after the other, or would if values were contiguous
    if values.ndim > 2:
        b = math.prod(values.shape[2:])
    elif values.ndim == 2:
        rows = {"instruction": values.shape[1], "fairseq": _FAIRSEQ_BLOCK}
        b = rule if isinstance(rule, int) else rows.get(rule, 1)
        within = values.shape[1] if isinstance(rule, int) else within
    if b <= 1:
        return values
    if within % b:
        raise InputError(
            f"blocks of b = {b} entries must divide a {'row' if isinstance(rule, int) else 'tensor'}, but the shape is "
            f'{tuple(values.shape)}; use a divisor of {within}, or "paper" for none.'
        )
    if values.numel() == 0:
        return values
    if values.ndim > 2:
        return torch.empty_like(values).copy_(values.mean(dim=tuple(range(2, values.ndim)), keepdim=True))
    blocks = values.reshape(-1, b)
    return torch.empty_like(values).copy_(blocks.mean(dim=1, keepdim=True).expand_as(blocks).reshape(values.shape))
