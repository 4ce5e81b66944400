"""A model at another width: chains of known layers are rebuilt, other models say themselves how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from curvature.data.random_states import random_states_kept
from curvature.errors import InputError

__all__ = ["at_width", "width_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def at_width(model: nn.Module, width: int) -> nn.Module:
    """Return a model like this one whose first hidden layer has `width` units, and the others in proportion.

    Args:
        model: one with a method `at_width(width)` that returns such a model, or nested `nn.Sequential` of linear
            layers, convolutions, batch normalisation and layers without parameters.
        width: at least 1. Other hidden layers are rounded, to 1 at least.

    Raises:
        InputError: for any other model.
    """
    if width < 1:
        raise InputError(f"a width must be at least 1, got {width}.")
    own: Callable[[int], Any] | None = getattr(model, "at_width", None)
    if callable(own):
        made = own(width)
        if not isinstance(made, nn.Module):
            raise InputError(f"{type(model).__name__}.at_width returned {type(made).__name__}; return a module.")
        return made
    leaves = _leaves(model)
    with random_states_kept():
        return _resized(model, leaves, width / _size(leaves[0]))


def _resized(model: nn.Module, leaves: list[nn.Module], share: float) -> nn.Module:
    wide, last = copy.deepcopy(model), leaves[-1]
    before: tuple[int, int] | None = None  # sizes of the layer before, then and now
    for leaf, new in zip(leaves, _leaves(wide), strict=True):
        if isinstance(leaf, _NORMS):
            assert before is not None
            _resize_norm(new, before[1])
            continue
        inputs = _inputs(leaf) if before is None else _inputs(leaf) * before[1] // before[0]
        outputs = _size(leaf) if leaf is last else max(1, round(share * _size(leaf)))
        _resize(new, inputs, outputs)
        before = (_size(leaf), outputs)
    return wide


def width_of(model: nn.Module, num_params: float) -> int:
    """Return the smallest width with so many parameters."""
    low, high = 0, 1

    def size(width: int) -> int:
        return sum(p.numel() for p in at_width(model, width).parameters())

    while size(high) < num_params:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < num_params else (low, middle)
    return high


def _leaves(model: nn.Module) -> list[nn.Module]:
    """Return the layers with sizes, in the order of the chain."""
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) or not any(True for _ in module.parameters()):
            continue
        plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_NORMS))
        if not plain or getattr(module, "groups", 1) != 1 or (isinstance(module, _NORMS) and not found):
            raise InputError(
                f"the width of {type(model).__name__} cannot be varied: {name or 'it'} is a {type(module).__name__}. "
                "Chains (nn.Sequential) of linear layers, convolutions and batch normalisation are known; give other "
                "models a method at_width(width) that returns one of that width."
            )
        found.append(module)
    if len([m for m in found if not isinstance(m, _NORMS)]) < 2:
        raise InputError(f"{type(model).__name__} has no hidden layer whose width could be varied.")
    while isinstance(found[-1], _NORMS):
        raise InputError("a chain that ends with a normalisation has no output layer; its width cannot be varied.")
    return found


def _size(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _resize(layer: Any, inputs: int, outputs: int) -> None:
    """Give a layer other sizes; its values are drawn later."""
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = inputs, outputs
    else:
        layer.in_channels, layer.out_channels = inputs, outputs
    shape = (outputs, inputs, *layer.weight.shape[2:])
    layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(outputs))
    layer.reset_parameters()


def _resize_norm(norm: Any, size: int) -> None:
    norm.num_features = size
    for name, value in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(value.new_ones(size)))
    for name, value in list(norm.named_buffers(recurse=False)):
        if value.ndim:
            setattr(norm, name, value.new_zeros(size))
    norm.reset_parameters()
