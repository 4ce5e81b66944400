"""What BackPACK gets right: which layers, under which settings, for which quantity.

BackPACK computes with one rule for each type of layer. It says nothing where a rule does not apply: hooks and
reparametrised weights are passed over, tied weights overwrite each other, modes and settings outside the rule give
other numbers. So the decision is made before it runs, layer by layer, and names the first offender;
`docs/backpack_support.md` crosses layers, losses and quantities with dense matrices.

Losses are not in it: they enter as columns of our own (`curvature.layerwise.loss_root`), never through BackPACK's
rules, whose divisors do not know of ignored targets and of factors in front of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["LAYERS", "Leaves", "Quantity", "UnsupportedError", "layer_refusal", "user_hooks"]

Quantity = Literal["diag_ggn", "diag_hessian", "kron", "kfra", "first_order"]
Leaves = Literal["diag_ggn", "diag_hessian", "kflr", "kfra", "gradients", "squared_norms", "sum_of_squares"]
"""What a pass of BackPACK leaves on the parameters."""


class UnsupportedError(Exception):
    """BackPACK is not to be used here; the message is the reason. Never leaves the package on route="auto"."""


def _convolution(module: Any, _: Quantity) -> str | None:
    if module.padding_mode != "zeros":
        return f"pads with {module.padding_mode!r}; BackPACK's rule takes zeros"
    if isinstance(module.padding, str):
        return f"has padding={module.padding!r}; BackPACK's rule needs numbers"
    return None


def _transposed(module: Any, _: Quantity) -> str | None:
    if any(module.output_padding):
        return "has output_padding, which BackPACK's rule passes over"
    return _convolution(module, _)


def _max_pool(module: Any, _: Quantity) -> str | None:
    return "returns indices" if module.return_indices else None


def _average_pool(module: Any, _: Quantity) -> str | None:
    if not module.count_include_pad or module.ceil_mode or getattr(module, "divisor_override", None) is not None:
        return "has count_include_pad=False, ceil_mode or divisor_override, which BackPACK's rule passes over"
    return None


def _batch_norm(module: Any, _: Quantity) -> str | None:
    if module.training or not module.track_running_stats:
        return "couples the examples of a batch (train mode)"
    return None if module.affine else "has no affine part, which BackPACK's rule requires"


def _embedding(module: Any, _: Quantity) -> str | None:
    if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "has padding_idx, max_norm, scale_grad_by_freq or sparse, which BackPACK's rule does not know"
    return None


def _dropout(module: Any, quantity: Quantity) -> str | None:
    if module.training and (module.p >= 1 or quantity in ("kron", "kfra")):
        return "is in train mode"
    return None


def _flatten(module: Any, _: Quantity) -> str | None:
    return None if (module.start_dim, module.end_dim) == (1, -1) else "flattens other dimensions than 1 to -1"


def _any_setting(_: Any, __: Quantity) -> str | None:
    return None


_CURVED: tuple[Quantity, ...] = ("diag_ggn", "diag_hessian", "first_order")
_FACTORED: tuple[Quantity, ...] = (*_CURVED, "kron", "kfra")

LAYERS: dict[type, tuple[tuple[Quantity, ...], Callable[[Any, Quantity], str | None]]] = {
    nn.Linear: (_FACTORED, _any_setting),
    nn.Conv1d: (_CURVED, _convolution),
    nn.Conv2d: (_CURVED, _convolution),
    nn.Conv3d: (_CURVED, _convolution),
    nn.ConvTranspose1d: (_CURVED, _transposed),
    nn.ConvTranspose2d: (_CURVED, _transposed),
    nn.ConvTranspose3d: (_CURVED, _transposed),
    nn.BatchNorm1d: (_CURVED, _batch_norm),
    nn.BatchNorm2d: (_CURVED, _batch_norm),
    nn.BatchNorm3d: (_CURVED, _batch_norm),
    nn.Embedding: (_CURVED, _embedding),
    nn.ReLU: (_FACTORED, _any_setting),
    nn.Sigmoid: (_FACTORED, _any_setting),
    nn.Tanh: (_FACTORED, _any_setting),
    nn.LeakyReLU: (_CURVED, _any_setting),
    nn.LogSigmoid: (_CURVED, _any_setting),
    nn.ELU: (_CURVED, _any_setting),
    nn.SELU: (_CURVED, _any_setting),
    nn.Flatten: (_FACTORED, _flatten),
    nn.Dropout: (_FACTORED, _dropout),
    nn.ZeroPad2d: (_CURVED, _any_setting),
    nn.MaxPool1d: (_CURVED, _max_pool),
    nn.MaxPool2d: (_CURVED, _max_pool),
    nn.MaxPool3d: (_CURVED, _max_pool),
    nn.AvgPool1d: (_CURVED, _average_pool),
    nn.AvgPool2d: (_CURVED, _average_pool),
    nn.AvgPool3d: (_CURVED, _average_pool),
    nn.AdaptiveAvgPool1d: (_CURVED, _any_setting),
    nn.AdaptiveAvgPool2d: (_CURVED, _any_setting),
    nn.AdaptiveAvgPool3d: (_CURVED, _any_setting),
}
"""type -> (quantities there is a rule for, BackPACK's or one made of its parts; what settings forbid)."""


def layer_refusal(name: str, module: nn.Module, quantity: Quantity) -> str | None:
    """Return why BackPACK is not to be used on a layer, or None."""
    kind = type(module)
    name = f"layer {name!r}" if name else "the model"
    if "forward" in vars(module):
        return f"{name} ({kind.__name__}) has a forward of its own"
    if user_hooks(module):
        return f"{name} ({kind.__name__}) has hooks (weight_norm, spectral_norm or the user's)"
    if kind not in LAYERS:
        return f"{name} is a {kind.__name__}, which is not in the table of layers"
    quantities, setting = LAYERS[kind]
    if quantity not in quantities:
        return f"{name} is a {kind.__name__}, for which BackPACK has no rule for this quantity"
    why = setting(module, quantity)
    return None if why is None else f"{name} ({kind.__name__}) {why}"


_HOOKS: Sequence[str] = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def user_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks of a module that are not BackPACK's own."""
    hooks = [hook for store in _HOOKS for hook in getattr(module, store).values()]
    return [hook for hook in hooks if not (getattr(hook, "__module__", "") or "").startswith("backpack")]


def features(tensor: Tensor) -> int:
    """Return the number of entries of one example."""
    return tensor[0].numel() if tensor.ndim > 0 and len(tensor) else 1
