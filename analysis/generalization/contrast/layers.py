"""Chains with further layers, and what is done to the inputs of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation

from curvature.errors import InputError

__all__ = ["changed_inputs", "has_batch_norm", "with_batch_norm", "with_dropout"]

_NORM_AFTER = {
    nn.Linear: (nn.BatchNorm1d, "out_features"),
    nn.Conv1d: (nn.BatchNorm1d, "out_channels"),
    nn.Conv2d: (nn.BatchNorm2d, "out_channels"),
    nn.Conv3d: (nn.BatchNorm3d, "out_channels"),
}
_ACTIVATIONS = tuple(
    kind
    for kind in vars(activation).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether some module normalises over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """Return a chain with dropout after each activation.

    Raises:
        InputError: for a model that is no chain, or has no activation.
    """
    found = _inserted(model, lambda layer: nn.Dropout(p) if isinstance(layer, _ACTIVATIONS) else None)
    if not any(isinstance(m, nn.Dropout) for m in found.modules()):
        raise InputError(f"{type(model).__name__} has no activation module after which dropout could stand.")
    return found


def with_batch_norm(model: nn.Module) -> nn.Module:
    """Return a chain with batch normalisation after each linear layer and convolution but the last.

    Raises:
        InputError: for a model that is no chain, or has no hidden layer.
    """
    layers = [m for m in model.modules() if isinstance(m, tuple(_NORM_AFTER))]  # parametrised ones among them

    def norm(layer: nn.Module) -> nn.Module | None:
        kinds = [kind for kind in _NORM_AFTER if isinstance(layer, kind)]
        if not kinds or layer is layers[-1]:
            return None
        kind, size = _NORM_AFTER[kinds[0]]
        p = next(layer.parameters())
        return kind(getattr(layer, size), dtype=p.dtype, device=p.device)

    found = _inserted(model, norm)
    if not has_batch_norm(found):
        raise InputError(f"{type(model).__name__} has no hidden layer after which batch norm could stand.")
    return found


def _inserted(model: nn.Module, after: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Return nested `nn.Sequential` with what `after` returns behind each layer."""
    if not isinstance(model, nn.Sequential):
        raise InputError(f"layers are inserted into chains (nn.Sequential), not into {type(model).__name__}.")
    parts: list[nn.Module] = []
    for layer in model:
        parts.append(_inserted(layer, after) if isinstance(layer, nn.Sequential) else layer)
        if (further := after(layer)) is not None:
            parts.append(further)
    return nn.Sequential(*parts)


def changed_inputs(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) shifted by up to a pixel each way, or other inputs with a tenth of noise.

    The generator is one on the CPU.
    """
    if x.ndim != 4:
        return x + 0.1 * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    N, _, H, W = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    down, right = (torch.randint(0, 3, (N, 1), generator=generator) for _ in range(2))
    rows, columns = (down + torch.arange(H)).to(x.device), (right + torch.arange(W)).to(x.device)
    each = torch.arange(N, device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
