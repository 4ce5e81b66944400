"""Do examples stay in the rows where they are? Which functions cannot move them, and a proof for those that can."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.per_example.layout import Examples, Layout

__all__ = ["follows", "reads_number", "rows_stay"]

_NAMES = """
get add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv neg pow rpow len eq ne lt le gt ge div square
sqrt rsqrt exp log log1p sin cos tanh sigmoid erf abs clamp relu gelu silu elu selu celu leaky_relu softplus softsign
hardtanh hardswish hardsigmoid mish logsigmoid prelu glu softmax log_softmax dropout dropout1d dropout2d dropout3d
linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding layer_norm
group_norm rms_norm batch_norm instance_norm scaled_dot_product_attention multi_head_attention_forward max_pool1d
max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
interpolate pad mean sum amax amin var std norm view view_as reshape flatten unflatten squeeze unsqueeze transpose
permute movedim swapaxes t contiguous expand expand_as chunk split narrow select cat concat stack to float double
half bfloat16 type_as size dim numel stride is_contiguous is_floating_point get_device requires_grad detach clone
masked_fill tril triu arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full
new_empty tensor lerp addcmul cross_entropy mse_loss nll_loss binary_cross_entropy_with_logits is_complex
broadcast_tensors logical_and logical_or logical_not and or invert bool is_autocast_enabled isfinite isnan
where reciprocal maximum minimum unbind
"""
_STAY = frozenset(_NAMES.split())
_PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm"))
_NUMBERS = frozenset(("__bool__", "__float__", "__index__", "__int__", "allclose", "equal", "item"))


def reads_number(func: Any) -> bool:
    """Return whether a call tells Python an entry of a tensor, by which it may decide anything."""
    return getattr(func, "__name__", "") in _NUMBERS


def rows_stay(func: Any, args: Sequence[Any], parameters: Collection[int]) -> bool:
    """Return whether a call leaves examples in their rows whatever the data are; static rearrangements count as such.

    Args:
        func: of torch.
        args: of the call.
        parameters: ids of tensors that are the same for all data.
    """
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(part, (Tensor, list)) for part in index)
    if name in _PRODUCTS:  # of 2-dimensional activations it may be a permutation
        return all(isinstance(t, Tensor) and (t.ndim > 2 or id(t) in parameters) for t in args[:2]) or any(
            id(t) in parameters for t in args[:2]
        )
    return name.strip("_") in _STAY


def follows(delta: Tensor, scaled: Tensor | None, layout: Layout, scale: Tensor) -> Tensor:
    """Return whether rows belong to the examples that a layout says, (); they do if they scale as their examples do.

    Args:
        delta: gradient in the output of a use, of all examples.
        scaled: the same with the gradient in the outputs of example i multiplied by scale_i.
        layout: of the use.
        scale: (N,), all different.
    """
    examples = Examples(len(scale), layout)
    found = None if scaled is None else examples.arranged(scaled)
    plain = examples.arranged(delta)
    if found is None or plain is None:
        return torch.zeros((), dtype=torch.bool, device=delta.device)
    wide = torch.promote_types(delta.dtype, torch.float32)
    found, plain = (t.reshape(len(scale), -1).to(wide) for t in (found, plain))
    expected = plain * scale.to(wide)[:, None]
    tolerance = min(1e4 * torch.finfo(delta.dtype).eps, 0.05)
    return ((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all()
