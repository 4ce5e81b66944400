"""Random directions added to what layers give out, and each layer's gradient from its own part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from curvature.errors import InputError

__all__ = ["Call", "layers_of", "local_gradients", "perturbed", "refuse_coupled"]

Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """A forward pass of a layer."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    direction: Tensor  # what was drawn for its output


def layers_of(model: nn.Module, params: Sequence[Tensor]) -> list[nn.Module]:
    """Return the modules that hold the parameters themselves.

    Raises:
        InputError: if a parameter belongs to none.
    """
    wanted = {id(p) for p in params}
    layers = [m for m in model.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]
    held = {id(p) for m in layers for p in m.parameters(recurse=False)}
    if missing := [p for p in params if id(p) not in held]:
        raise InputError(
            f"{len(missing)} parameters, the first of shape {tuple(missing[0].shape)}, belong to no layer of "
            "activities_of: give the model that holds all of the optimizer's parameters, or leave it out."
        )
    return layers


@contextmanager
def perturbed(layers: Sequence[nn.Module], draw: Draw) -> Iterator[list[Call]]:
    """Give every output of the layers a random tangent, and collect the calls."""
    calls: list[Call] = []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise InputError(
                f"a layer {type(layer).__name__} returns {type(output).__name__}, and activities are perturbed where "
                "layers return one tensor: leave activities_of out, which perturbs the weights."
            )
        direction = draw(_primal(output))
        plain = tuple(_primal(a) for a in args), {name: _primal(a) for name, a in kwargs.items()}
        calls.append(Call(layer, *plain, direction))
        return output + forward_ad.make_dual(torch.zeros_like(direction), direction)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
        yield calls


def local_gradients(calls: Sequence[Call], factor: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sum over calls of each layer's own gradient for the cotangent `factor` times its direction.

    Args:
        calls: of one evaluation.
        factor: a scalar, or one number an example, (N,).
        params: those to differentiate by.

    Raises:
        InputError: if a layer's output does not begin with the N examples.
    """
    found: dict[int, Tensor] = {}
    chosen = {id(p) for p in params if p.requires_grad}
    for call in calls:
        own = [p for p in call.layer.parameters(recurse=False) if id(p) in chosen]
        direction = call.direction
        if factor.ndim == 1:
            if direction.shape[:1] != factor.shape:
                raise InputError(
                    f"a layer {type(call.layer).__name__} returns {tuple(direction.shape)} for {len(factor)} examples, "
                    "so that its rows are none: return the loss instead of (outputs, targets)."
                )
            direction = direction * factor.view(-1, *[1] * (direction.ndim - 1)).to(direction.dtype)
        else:
            direction = direction * factor.to(direction.dtype)
        with torch.enable_grad():
            output = call.layer(*call.args, **call.kwargs)
            gradients = torch.autograd.grad(output, own, direction, allow_unused=True)
        for p, g in zip(own, gradients, strict=True):
            if g is not None:
                found[id(p)] = found[id(p)] + g if id(p) in found else g
    return [found.get(id(p)) for p in params]


def refuse_coupled(model: nn.Module) -> None:
    """Refuse examples that see each other: a direction of one would count for another.

    Raises:
        InputError: for batch normalisation in training mode.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise InputError(
                f"examples see each other in {name or 'the model'}, a {type(layer).__name__} in training mode: return "
                "the loss instead of (outputs, targets), call eval() on such layers, or leave activities_of out."
            )


def _primal(value: Any) -> Any:
    return forward_ad.unpack_dual(value).primal.detach() if isinstance(value, Tensor) else value
