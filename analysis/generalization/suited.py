"""Whether a model and a loss are of the kind that these trainings are made for, asked before any is paid for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from curvature.errors import InputError
from curvature.objective.shards import is_part

__all__ = ["copy_of", "require_suited_loss"]

_EXAMPLES = 48
_WAY_OUT = "choose loss='cross-entropy' (--loss cross-entropy), or give a loss that is such a mean"


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        InputError: for one that holds a tensor with a graph, as the old `torch.nn.utils.weight_norm` leaves it, and one
            that lies in parts on several ranks.
    """
    if any(map(is_part, model.parameters())):
        raise InputError(
            f"this {type(model).__name__} lies in parts on several ranks, and copies are what is worked on; work on it "
            "before it is sharded."
        )
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({_line(error)}), and copies are what is worked on; give modules "
            "whose tensors are parameters and buffers. Those of torch.nn.utils.weight_norm are not: remove_weight_norm."
        ) from error


def require_suited_loss(
    loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor, num_classes: int, dtype: torch.dtype
) -> None:
    """Require a loss that is the mean over examples of a loss of each, that runs under vmap and in float64.

    Class weights, ignored labels and sums are none: the curvature of single examples would be that of another loss.

    Args:
        loss: of outputs (N, C) and labels (N,).
        labels: that there are, on the device of the trainings; all classes are tried beside them.
        num_classes: C.
        dtype: of the model.

    Raises:
        InputError: for another loss.
    """
    g = torch.Generator().manual_seed(0)
    y = torch.cat([labels[:_EXAMPLES], torch.arange(num_classes, device=labels.device)[: 4 * _EXAMPLES]])
    for kind in dict.fromkeys((dtype, torch.float64)):  # curvature is measured in float64
        z = torch.randn(len(y), num_classes, generator=g, dtype=torch.float64).to(y.device, kind)
        try:
            whole = loss(z, y)
            each = torch.stack([loss(z[i : i + 1], y[i : i + 1]) for i in range(len(y))])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"the loss does not run on outputs {tuple(z.shape)} of {kind} and class labels ({_line(error)}); "
                f"curvature is measured in float64. Let it follow the dtype of the outputs, or {_WAY_OUT}."
            ) from error
        if whole.ndim != 0:
            raise InputError(f"the loss must return one number, got shape {tuple(whole.shape)}; use reduction='mean'.")
        off = (whole.double() - each.double().mean()).abs()
        scale = float(each.double().abs().mean())
        if not float(off) <= 1e3 * torch.finfo(kind).eps * max(scale, 1e-6):
            raise InputError(
                f"the loss must be a mean in which each example counts alike; of {len(y)} examples it is "
                f"{float(whole):.4g}, and the mean of those of each is {float(each.double().mean()):.4g}. Class "
                f"weights, ignored labels and reduction='sum' are not served here: {_WAY_OUT}."
            )
    try:
        vmap(loss)(torch.stack([z, -z]), torch.stack([y, y]))
        vmap(jacrev(jacrev(lambda a, t: loss(a[None], t[None]))))(z[:2], y[:2])
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the loss does not run for several networks at once under torch.vmap ({_line(error)}); write it without "
            f"data-dependent control flow (if, .item(), F.one_hot), or {_WAY_OUT}."
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
