"""A model's random numbers replaced by constants, so that a batch and its parts meet the same."""

from __future__ import annotations

import types as python_types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SteadyDraws", "inside"]

_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_DRAWS = ("bernoulli", "normal", "uniform", "rand", "exponential", "cauchy", "log_normal",
          "geometric", "multinomial", "poisson", "binomial")  # fmt: skip
_RECURRENT = {"lstm": 5, "gru": 5, "rnn_tanh": 5, "rnn_relu": 5}  # place of the dropout among the arguments


class SteadyDraws(TorchFunctionMode):
    """While active, dropout does nothing and what is drawn is constant; a permutation becomes the reversed order.

    Examples that are mixed at random are then mixed all the same.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs, args = getattr(func, "__name__", ""), dict(kwargs or {}), list(args)
        stem = name.rstrip("_")
        if stem.rstrip("123d") in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            return func(*args[:4], **{**kwargs, "dropout_p": 0.0, **_named(args[5:], ("is_causal",))})
        if name in _RECURRENT and len(args) > _RECURRENT[name]:
            args[_RECURRENT[name]] = 0.0
        if isinstance(func, python_types.FunctionType) and func.__module__ == F.__name__:
            with self:
                return inside(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if (
            stem.removesuffix("_like").startswith(_DRAWS)
            and isinstance(out, Tensor)
            and not stem.startswith("normalize")
        ):
            with torch.no_grad():
                if name.startswith("randperm"):
                    return torch.arange(len(out) - 1, -1, -1, device=out.device, dtype=out.dtype)
                out.fill_(0.5 if out.is_floating_point() or out.is_complex() else out.dtype == torch.bool)
        return out


def inside(func: python_types.FunctionType) -> Callable[..., Any]:
    """Return a function of torch.nn.functional without its dispatch to modes, so that its own calls can be seen."""
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    plain = python_types.FunctionType(func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__)
    plain.__kwdefaults__ = func.__kwdefaults__
    return plain


def _named(values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, values, strict=False))
