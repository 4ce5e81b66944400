"""Normalisations written in elementary operations, right to every order of differentiation.

torch's own kernels for them are right to a certain order only: layer normalisation, and batch and instance
normalisation by statistics of the batch, to the second, weight normalisation to the first. Root-mean-square and group
normalisation are right; the former is fused on some devices and is written out with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NORMALISATIONS", "differentiated_by_transform", "weight_norm"]


def differentiated_by_transform() -> bool:
    """Say whether a derivative is being taken around what runs now, by `torch.func` or in forward mode."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or ())


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v|, the norm over all dimensions but `dim` (over all for -1)."""
    dims = [i for i in range(v.ndim) if i != dim]
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _normalised(x: Tensor, dims: Sequence[int], eps: float, *, centred: bool = True) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(tuple(dims), keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(tuple(dims), keepdim=True) + eps)


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    z = z if weight is None else z * weight.view(shape)
    return z if bias is None else z + bias.view(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return _affine(_normalised(input, range(-len(shape), 0), eps), weight, bias, shape)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps
    return _affine(_normalised(input, range(-len(shape), 0), eps, centred=False), weight, None, shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor | None:
    if not training:
        return None
    return _affine(_normalised(input, (0, *range(2, input.ndim)), eps), weight, bias, (1, -1, *(1,) * (input.ndim - 2)))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor | None:
    if not use_input_stats:
        return None
    return _affine(_normalised(input, range(2, input.ndim), eps), weight, bias, (1, -1, *(1,) * (input.ndim - 2)))


def _torch_order(rule: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Turn (x, mean, variance, weight, bias, ...) into (x, weight, bias, mean, variance, ...), as `torch.*` has it."""

    def reordered(
        input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        return rule(input, running_mean, running_var, weight, bias, *args, **kwargs)

    return reordered


def _as_recorded(rule: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Run torch's own function besides, for its running statistics and the dtype of its output."""

    def composed(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        written_out = rule(*args, **kwargs)
        if written_out is None:
            return None
        with torch.no_grad():
            dtype = func(*args, **kwargs).dtype
        return written_out.to(dtype)

    return composed


NORMALISATIONS: dict[Any, Callable[..., Tensor | None]] = {
    F.layer_norm: _as_recorded(_layer_norm),
    torch.layer_norm: _as_recorded(_layer_norm),
    F.rms_norm: _as_recorded(_rms_norm),
    torch.rms_norm: _as_recorded(_rms_norm),
    F.batch_norm: _as_recorded(_batch_norm),
    torch.batch_norm: _as_recorded(_torch_order(_batch_norm)),
    F.instance_norm: _as_recorded(_instance_norm),
    torch.instance_norm: _as_recorded(_torch_order(_instance_norm)),
}
"""torch's function -> (that function, its arguments) -> the result in elementary operations, None to leave it."""
