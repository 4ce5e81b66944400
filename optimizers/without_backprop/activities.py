"""Random directions added to what layers give out, and each layer's gradient from its own part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from curvature.errors import InputError

__all__ = ["Call", "around_layers", "layers_of", "local_gradients", "perturbed", "refuse_coupled"]

Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """A forward pass of a layer."""

    own: list[Tensor]
    """The parameters that the layer holds itself."""
    output: Tensor  # with its graph down to these, and no further
    direction: Tensor  # what was drawn for it


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
def perturbed(layers: Sequence[nn.Module], params: Sequence[Tensor], draw: Draw) -> Iterator[list[Call]]:
    """Give every output of the layers a random tangent, and collect the calls.

    A layer's graph is recorded while it runs, so under the autocast and with the random numbers of its pass; what it
    gives out has none. The parameters must be frozen.
    """
    calls: list[Call] = []
    begun: list[ExitStack] = []

    def begin(own: list[Tensor]) -> None:
        begun.append(ExitStack())
        begun[-1].enter_context(torch.enable_grad())
        begun[-1].enter_context(
            saved_tensors_hooks(_pack, _unpack)
        )  # those of activation checkpointing would run again
        for p in own:
            p.requires_grad_(True)

    def end(layer: nn.Module, own: list[Tensor], still: set[int], output: Any) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(output) if isinstance(output, Tensor) else (output, None)
        begun.pop().close()
        for p in own:
            p.requires_grad_(id(p) in still)
        if not isinstance(output, Tensor):
            raise InputError(
                f"a layer {type(layer).__name__} returns {type(output).__name__}, and activities are perturbed where "
                "layers return one tensor: leave activities_of out, which perturbs the weights."
            )
        direction = draw(primal.detach())
        calls.append(Call(own, primal, direction))
        if begun:  # a layer inside a layer
            return output + forward_ad.make_dual(torch.zeros_like(direction), direction)
        total = direction if tangent is None else tangent.detach() + direction
        return forward_ad.make_dual(primal.detach().clone(), total)

    try:
        with around_layers(layers, params, begin, end):
            yield calls
    finally:
        while begun:  # a forward pass was broken off
            begun.pop().close()


@contextmanager
def around_layers(
    layers: Sequence[nn.Module],
    params: Sequence[Tensor],
    begin: Callable[[list[Tensor]], None],
    end: Callable[[nn.Module, list[Tensor], set[int], Any], Any],
) -> Iterator[None]:
    """Call `begin(own)` before each pass of a layer and `end(layer, own, still, output)` after it.

    `own` are the parameters that it holds itself, `still` the ids of those of layers that it runs inside of.
    """
    chosen = {id(p) for p in params}
    inside: list[list[Tensor]] = []

    def before(layer: nn.Module, _: Any) -> None:
        inside.append([p for p in layer.parameters(recurse=False) if id(p) in chosen])
        begin(inside[-1])

    def after(layer: nn.Module, _: Any, output: Any) -> Any:
        own = inside.pop()
        return end(layer, own, {id(p) for outer in inside for p in outer}, output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before, prepend=True).remove)  # weight_norm has one, too
            stack.callback(layer.register_forward_hook(after).remove)
        yield


def local_gradients(calls: Sequence[Call], factor: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sum over calls of each layer's own gradient for the cotangent `factor` times its direction.

    Args:
        calls: of one evaluation.
        factor: a scalar, or one number an example, (N,).
        params: those to differentiate by.
    """
    found: dict[int, Tensor] = {}
    for call in calls:
        if not call.output.requires_grad:
            continue
        direction = call.direction
        shape = factor.shape if factor.ndim == 0 else (-1, *[1] * (direction.ndim - 1))
        cotangent = direction * factor.view(shape).to(direction.dtype)
        gradients = torch.autograd.grad(call.output, call.own, cotangent, allow_unused=True, retain_graph=True)
        for p, g in zip(call.own, gradients, strict=True):
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


def _pack(saved: Tensor) -> tuple[Tensor, int]:
    return saved, saved._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:
        raise InputError(
            f"a tensor of shape {tuple(saved.shape)} that a layer needs for its gradient was overwritten after its "
            "pass: replace the operation in place, or leave activities_of out."
        )
    return saved
