"""Operations whose backward pass torch cannot differentiate, written in operations that it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.environment.device import ATTENTION_KERNELS

__all__ = ["OF_LOSS", "SUBSTITUTES"]

_MATH = SDPBackend.MATH
_SCALING = 5  # place of scale_grad_by_freq in both embeddings


def _embedding(
    index: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001 - gradients that are sparse have no second derivative
) -> Tensor:
    return F.embedding(index, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(
    index: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if mode == "max" or scale_grad_by_freq or max_norm is not None:
        kept = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(index, weight, offsets, *kept, padding_idx)
    if offsets is None:
        bags = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
        num_bags = len(index)
    else:
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(index)])])
        starts = offsets[:-1] if include_last_offset else offsets
        num_bags = len(starts)
        bags = torch.arange(num_bags, device=index.device).repeat_interleave(ends - starts)
    index = index.reshape(-1)
    rows = F.embedding(index, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    counts = torch.ones_like(index, dtype=rows.dtype)
    if padding_idx is not None:
        counts = (index != padding_idx % len(weight)).to(rows.dtype)
        rows = rows * counts[:, None]
    total = rows.new_zeros(num_bags, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return total
    return total / counts.new_zeros(num_bags).index_add(0, bags, counts).clamp_min(1)[:, None]


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:  # noqa: ARG001
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)


def _by_math(function: Callable[..., Any], masks: tuple[str, ...], place: int) -> Callable[..., Any]:
    """Take the math kernel where the model asks for fused ones alone, which have no second derivative.

    Nor is their first right with a mask of numbers, where a row sees nothing but huge negative ones (`finfo.min`): they
    keep the logarithm of a sum, in which log(n) is rounded away, and go backward with weights n times too large.

    Args:
        function: attention.
        masks: its arguments that may be masks.
        place: of the first of them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args[place : place + 1], *map(kwargs.get, masks))
        of_numbers = any(isinstance(mask, Tensor) and mask.is_floating_point() for mask in given)
        others = of_numbers and any(is_on() for kernel, (is_on, _) in ATTENTION_KERNELS.items() if kernel is not _MATH)
        if ATTENTION_KERNELS[_MATH][0]() and not others:
            return function(*args, **kwargs)
        with sdpa_kernel(_MATH):
            return function(*args, **kwargs)

    return call


def _named(substitute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Take the first argument by its name in torch, too."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return substitute(*args, **kwargs) if args else substitute(kwargs.pop("input"), **kwargs)

    return call


SUBSTITUTES: dict[Any, Callable[..., Tensor]] = {
    F.embedding: _named(_embedding),
    F.embedding_bag: _named(_embedding_bag),
    torch.cdist: _cdist,
    F.scaled_dot_product_attention: _by_math(F.scaled_dot_product_attention, ("attn_mask",), 3),
    F.multi_head_attention_forward: _by_math(F.multi_head_attention_forward, ("attn_mask", "key_padding_mask"), 16),
}


def _unscaled(substitute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Leave out that gradients are scaled by how often a row occurs: scaled, they are derivatives of nothing."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("scale_grad_by_freq", None)
        return substitute(*(arg if i != _SCALING else False for i, arg in enumerate(args)), **kwargs)

    return call


OF_LOSS = SUBSTITUTES | {func: _unscaled(SUBSTITUTES[func]) for func in (F.embedding, F.embedding_bag)}
"""The same where what is differentiated is the loss, whatever training makes of its gradients."""
