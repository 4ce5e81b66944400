"""Which dimension of a weight counts the filters of its layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["filter_dims", "kept_filters"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_dims(model: nn.Module) -> dict[str, int]:
    """Return the dimension of the output units for weights that do not have it first.

    Transposed convolutions have (in, out / groups, ...), the Conv1D of Hugging Face's GPT-2 is a linear layer as
    (in, out); what their weight is made of by a parametrization or pruning is laid out alike.
    """
    dims = {}
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters() if _dim(module) else ():
            if key.removeprefix("parametrizations.").startswith("weight") and p.ndim == module.weight.ndim:
                dims[f"{prefix}.{key}" if prefix else key] = 1
    return dims


def _dim(module: nn.Module) -> int:
    names = [kind.__name__ for kind in type(module).__mro__]  # a parametrised module has a class of its own
    return int(isinstance(module, _TRANSPOSED) or ("Conv1D" in names and hasattr(module, "nf")))


def kept_filters(model: nn.Module) -> dict[str, Tensor]:
    """Return the filter of each entry, (k,), for masked weights whose k kept entries are stored as a vector."""
    found = {}
    for prefix, module in model.named_modules():
        lists = getattr(module, "parametrizations", None)
        for key, parts in lists.items() if isinstance(lists, nn.ModuleDict) else ():
            mask, stored = getattr(next(parts.children()), "mask", None), getattr(parts, "original", None)
            if not isinstance(mask, Tensor) or not isinstance(stored, Tensor) or mask.dtype != torch.bool:
                continue
            if mask.ndim >= 2 and stored.shape == (int(mask.sum()),):
                dim = _dim(module) if key == "weight" else 0
                found[f"{prefix}.parametrizations.{key}.original".lstrip(".")] = mask.nonzero()[:, dim]
    return found
