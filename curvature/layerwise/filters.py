"""Which dimension of a weight counts the filters of its layer."""

from __future__ import annotations

from torch import nn

__all__ = ["filter_dims"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_dims(model: nn.Module) -> dict[str, int]:
    """Return the dimension of the output units for weights that do not have it first.

    Transposed convolutions have (in, out / groups, ...), the Conv1D of Hugging Face's GPT-2 is a linear layer as
    (in, out).
    """
    dims = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _TRANSPOSED) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
            dims[f"{prefix}.weight" if prefix else "weight"] = 1
    return dims
