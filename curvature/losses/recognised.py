"""Which rule a loss goes by.

Torch's cross-entropy, mean squared error and binary cross-entropy with logits are recognised as modules, as functions
and as `functools.partial` of those; every other loss is handled by autograd.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError
from curvature.losses.rules import AnyLoss, BinaryCrossEntropyWithLogits, CrossEntropy, LossRule, SquaredError

__all__ = ["loss_rule"]

_MODULES: dict[type[nn.Module], type[LossRule]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.MSELoss: SquaredError,
    nn.BCEWithLogitsLoss: BinaryCrossEntropyWithLogits,
}
_FUNCTIONS: dict[Any, tuple[type[LossRule], frozenset[str]]] = {
    F.cross_entropy: (CrossEntropy, frozenset({"weight", "ignore_index", "label_smoothing", "reduction"})),
    F.mse_loss: (SquaredError, frozenset({"weight", "reduction"})),
    F.binary_cross_entropy_with_logits: (
        BinaryCrossEntropyWithLogits,
        frozenset({"weight", "pos_weight", "reduction"}),
    ),
}
"""Functions, their rules, and the settings that the rules honour."""


def loss_rule(loss: Callable[..., Tensor]) -> LossRule:
    """Return the rule for a loss function (outputs, targets) -> scalar.

    Raises:
        InputError: if the loss is not callable or reduces to more than one number (`reduction="none"`).
    """
    if not callable(loss):
        raise InputError(f"loss must be a function (outputs, targets) -> scalar, got {type(loss).__name__}.")
    function, keywords = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, keywords = loss.func, loss.keywords
    known = _FUNCTIONS.get(function) if isinstance(function, Hashable) else None
    if known is not None and set(keywords) <= known[1]:
        return known[0](loss, **keywords)
    for module, rule in _MODULES.items():
        if isinstance(loss, module) and _computes_as(loss, module):
            return rule(loss, str(loss.reduction))
    return AnyLoss(loss, keywords.get("reduction") or _stated_reduction(loss, function))


def _computes_as(loss: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether a loss computes what torch's class does: a subclass, an instance or a hook may change it."""
    own = vars(loss)
    hooks = (loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks)
    return (
        type(loss).forward is known.forward
        and type(loss).__call__ is nn.Module.__call__
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not any(hooks)
    )


def _stated_reduction(loss: Callable[..., Tensor], function: Callable[..., Tensor]) -> str:
    stated = getattr(loss, "reduction", None)
    if isinstance(stated, str):
        return stated
    try:
        default = inspect.signature(function).parameters["reduction"].default
    except (KeyError, TypeError, ValueError):
        return "mean"
    return default if isinstance(default, str) else "mean"
