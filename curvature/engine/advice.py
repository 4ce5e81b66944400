"""What to write where inputs, outputs or losses are not what an objective takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvature.data.tensors import attributes_of

__all__ = ["advice_on_inputs", "advice_on_loss", "advice_on_outputs", "first_line"]

_INTEGERS = re.compile(r"\b(long|int|short|char|byte|bool)\b", re.IGNORECASE)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def advice_on_inputs(inputs: Any, parameters: Sequence[Tensor], error: Exception) -> str | None:
    """Return what to do about inputs that a model failed on; None if they are not to blame."""
    if "more than 1 value per channel when training" in str(error):
        return "normalisation by batch in train mode needs two examples: leave out a batch of one, or call model.eval()"
    dtype = parameters[0].dtype
    if isinstance(inputs, Tensor):
        if inputs.dtype == dtype or "type" not in str(error):
            return None
        if not inputs.is_floating_point() and not _INTEGERS.search(str(error)):
            return None  # integers that an embedding took
        name = str(dtype).removeprefix("torch.")
        return (
            f"the inputs are {inputs.dtype} and the parameters {dtype}: convert the inputs, x.to(torch.{name}), or the "
            "model."
        )
    if isinstance(inputs, (Mapping, list, tuple)) and isinstance(error, TypeError):
        call = "model(**batch[0])" if isinstance(inputs, Mapping) else "model(*batch[0])"
        return (
            f"the model was called with one argument, a {type(inputs).__name__}: pass forward=lambda model, batch: "
            f"({call}, batch[1]) if its parts are separate arguments."
        )
    return None


def advice_on_outputs(outputs: Any, targets: Any, default_forward: bool) -> str | None:
    """Return what to do about outputs that a loss failed on; None if they are one tensor."""
    if isinstance(outputs, Tensor):
        if isinstance(targets, Tensor):
            return None
        return f"the targets are a {type(targets).__name__}: yield them as one tensor, or pass a loss= that takes them."
    if isinstance(outputs, Mapping):
        keys = [key for key, value in outputs.items() if isinstance(value, Tensor)]
        pick, parts = f"[{keys[0]!r}]" if keys else "[key]", f"with {', '.join(map(repr, keys))}"
    elif isinstance(outputs, (list, tuple)):
        pick, parts = "[0]", f"of {len(outputs)}"
    else:
        names = [name for name, value in attributes_of(outputs).items() if isinstance(value, Tensor)]
        pick, parts = f".{names[0]}" if names else ".name", f"with {', '.join(names)}"
    fed = f"model(batch[0]){pick}" if default_forward else f"outputs{pick}"
    return (
        f"the model returns a {type(outputs).__name__} {parts} and the loss takes a tensor: pass forward=lambda model, "
        f"batch: ({fed}, batch[1]), with the entry that the loss is of."
    )


def advice_on_loss(loss: Any) -> str:
    """Return what a loss is that is no tensor with one entry, and what to write."""
    if isinstance(loss, Tensor) and loss.is_complex():
        return f"{loss.dtype}; take its real part, or squares of absolute values, z.abs().square()."
    if isinstance(loss, Tensor):
        return f"{tuple(loss.shape)}; reduce it by a mean or a sum."
    if isinstance(loss, Mapping):
        return f"{type(loss).__name__} of {', '.join(map(repr, loss))}; return their sum, sum(losses.values())."
    if isinstance(loss, (list, tuple)):
        return f"{type(loss).__name__} of {len(loss)}; return their sum, sum(losses), or the entry that is the loss."
    if isinstance(getattr(loss, "loss", None), Tensor):
        return f"{type(loss).__name__}; return its entry .loss."
    return f"{type(loss).__name__}; return a tensor."
