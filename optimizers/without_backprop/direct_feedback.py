"""Direct feedback alignment: each layer learns from the output's error through a fixed random matrix.

Reference: Nokland (2016), Direct feedback alignment provides learning in deep neural networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from curvature.engine.repeated_evaluation import RepeatedEvaluation
from curvature.errors import InputError
from optimizers.shared.closures import loss_of
from optimizers.shared.probes import counter_generator

__all__ = ["DirectFeedbackAlignment"]

_STREAM = 22
_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


class DirectFeedbackAlignment:
    """Replaces the gradient that comes back to chosen layers by a random projection of the output's error.

        true:  dL/dh_l = (dh_{l+1}/dh_l)' dL/dh_{l+1}              here:  B_l e,   e = dL/d outputs

    with B_l fixed and normal, of variance 1 / (number of outputs). Hooks on the model do that in any backward pass, so
    that a training loop stays as it is:

        feedback = DirectFeedbackAlignment(model)
        loss_of(model(x), y).backward()                # `.grad` holds the gradients of direct feedback
        optimizer.step()                               # any optimizer
        feedback.remove()                              # the model is as before

    Between two cuts gradients are the true ones of what lies there: a layer with its normalisation and nonlinearity, or
    a residual block as a whole. What follows the last cut gets its true gradient. Without `layers`, an
    `nn.Sequential` is cut before each child with parameters, those that normalise left out. Other models name the
    modules whose outputs are cut, in the order of the forward pass: in a residual network the blocks, whose outputs
    carry the skip connection too. A path around all cuts carries the true gradient, as ever. A module that is called
    several times is cut after every call, each with its own feedback; where it stands in several places of an
    `nn.Sequential`, its names are these places.

    Learning works because the weights come to agree with the feedback: `alignment` measures how far.

    Cost: a backward pass, and a product with B_l for each cut. Memory: B_l, outputs times entries of h_l; where h and
    the outputs are both sequences of one length, outputs times width.

    Args:
        model: called with its inputs; its output is one tensor, whose first dimension are examples.
        layers: modules, by name, whose outputs are cut; None for an `nn.Sequential`.
        scale: factor on B. The size of steps in the early layers follows it.
        seed: of B, a function of (seed, place of the cut, shape), drawn in float32.

    Raises:
        InputError: for models that are not sequential without `layers`, unknown names, layers that a forward pass does
            not reach, modules whose places cannot be told apart, outputs that are no tensor, activation checkpointing.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> feedback = DirectFeedbackAlignment(model)
        >>> feedback.layers
        ('1', '3')
        >>> feedback.remove()
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | None = None, *, scale: float = 1.0, seed: int = 0
    ) -> None:
        self.model, self.scale, self.seed = model, scale, seed
        self.layers = tuple(_cuts(model)) if layers is None else tuple(layers)
        modules = dict(model.named_modules(remove_duplicate=False))
        if unknown := [name for name in self.layers if name not in modules or not name]:
            raise InputError(f"layers names {unknown[0]!r}, and the model has {', '.join(n for n in modules if n)}.")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers must name at least one module, each once, got {list(self.layers)}.")
        if isinstance(scale, bool) or not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
            raise InputError(f"scale must be a finite number >= 0, got {scale!r}.")
        self._active, self._pass = True, _Pass()
        self._feedback: dict[tuple[Any, ...], Tensor] = {}
        names: dict[nn.Module, list[str]] = {}
        for name in self.layers:
            names.setdefault(modules[name], []).append(name)
        self._places = {  # of modules whose calls are told apart: all their names, in the order of the calls
            module: _places_of(model, module, of_module)
            for module, of_module in names.items()
            if len(of_module) > 1 or layers is None
        }
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            *[module.register_forward_hook(self._hook_of(of_module[0])) for module, of_module in names.items()],
            model.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def matrix(self, name: str, h: Tensor, outputs: Tensor, call: int = 0) -> Tensor:
        """Return B_l, (entries of h for an example or token, outputs for one), for the cut after a layer."""
        sequence = h.ndim >= 3 and h.shape[:-1] == outputs.shape[:-1]
        rows = h.shape[-1] if sequence else math.prod(h.shape[1:])
        columns = outputs.shape[-1] if sequence else math.prod(outputs.shape[1:])
        key = (name, call, rows, columns, outputs.device, outputs.dtype)
        if key not in self._feedback:
            cpu = torch.device("cpu")  # so that it is the same on every device
            generator = counter_generator(cpu, _STREAM, self.seed, self.layers.index(name), call)
            drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
            self._feedback[key] = (drawn * (self.scale / max(1, columns) ** 0.5)).to(outputs.device, outputs.dtype)
        return self._feedback[key]

    def alignment(self, closure: Callable[[], Any], loss: Callable[..., Tensor] | None = None) -> dict[str, float]:
        """Return the cosine between the gradient by feedback and the true one, for each trained parameter.

        The closure returns the loss of a batch, or (outputs, targets) with `loss`; it is evaluated twice, on the same
        random numbers, and leaves `.grad`, running statistics and random streams alone. 1 after the last cut; NaN where
        a gradient is zero.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        params: list[Tensor] = [p for _, p in named]
        repeated, found = RepeatedEvaluation(params), []
        try:
            with repeated.watched():
                for active in (True, False):
                    self._active = active
                    with repeated.evaluation(moves=False):
                        value = loss_of(closure(), loss)[0]
                        found.append(torch.autograd.grad(value, params, allow_unused=True))
        finally:
            self._active = True
            repeated.finish(keep=False)
        return {name: _cosine(a, b) for (name, _), a, b in zip(named, *found, strict=True)}

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _begin(self, _: nn.Module, args: Any) -> None:
        del args
        self._pass = _Pass()

    def _hook_of(self, first: str) -> Callable[[nn.Module, Any, Any], Any]:
        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            del args
            name, places = first, self._places.get(module)
            if places is not None and not self._pass.ended:
                count = self._pass.counts[module] = self._pass.counts.get(module, 0) + 1
                name = places[min(count, len(places)) - 1]
                if name not in self.layers:
                    return output
            if not isinstance(output, Tensor):
                raise InputError(f"{name} returns {type(output).__name__}; name layers that return one tensor.")
            if torch._C._current_graph_task_id() != -1:
                raise InputError(
                    "activation checkpointing runs layers again in the backward pass, where their feedback is not "
                    "known: switch it off."
                )
            call = self._pass.calls.get(name, 0)
            self._pass.calls[name] = call + 1
            if not self._active:
                return output
            if self._pass.ended:
                raise InputError(f"{name} was called outside of the model, whose outputs give the error.")
            return _Cut.apply(output, self, self._pass, name, call)

        return cut

    def _end(self, _: nn.Module, args: Any, output: Any) -> None:
        del args
        seen, self._pass.ended = self._pass, True
        for module, places in self._places.items():
            if (count := seen.counts.get(module, 0)) > len(places):
                raise InputError(
                    f"a {type(module).__name__}, {' and '.join(places)} of the model, was called {count} times in a "
                    "pass, so that its calls cannot be told apart: give each place a module of its own."
                )
        if missed := [name for name in self.layers if name not in seen.calls]:
            raise InputError(f"the forward pass did not call {missed[0]}; name layers that it calls.")
        if not isinstance(output, Tensor):
            raise InputError(
                f"the model returns {type(output).__name__}, and its error is that of one tensor: wrap the model in a "
                "module that returns its outputs alone."
            )
        if self._active and output.requires_grad:
            output.register_hook(seen.take)


class _Pass:
    """One forward pass: calls of each layer so far, and the error of the outputs once it is known."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.counts: dict[nn.Module, int] = {}
        self.ended = False
        self.error: Tensor | None = None

    def take(self, error: Tensor) -> None:
        self.error = error.detach()


class _Cut(torch.autograd.Function):
    """The identity, whose gradient is the feedback."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, owner: DirectFeedbackAlignment, seen: _Pass, name: str, call: int) -> Tensor:
        ctx.of = owner, seen, name, call
        ctx.like = torch.empty_like(h, device="meta")
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        owner, seen, name, call = ctx.of
        if seen.error is None:
            raise InputError("the loss does not come from the model's outputs, whose error is fed back.")
        B, error = owner.matrix(name, ctx.like, seen.error, call), seen.error
        if B.shape[1] != error.shape[-1] or error.ndim < 2 or ctx.like.shape[:-1] != error.shape[:-1]:
            error = error.reshape(len(error), -1)
        return (error @ B.T).reshape(ctx.like.shape).to(ctx.like.dtype), None, None, None, None


def _cuts(model: nn.Module) -> list[str]:
    if not isinstance(model, nn.Sequential):
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"{type(model).__name__} is not an nn.Sequential: name the modules whose outputs are cut, such as "
            f"residual blocks, by layers=; its children are {names}."
        )
    children = list(model._modules.items())  # a module that stands in two places comes twice
    starts = [
        i
        for i, (_, child) in enumerate(children)
        if child is not None and any(True for _ in child.parameters()) and not isinstance(child, _NORMALISATIONS)
    ]
    if len(starts) < 2:
        raise InputError("the model has one layer with parameters, which gets its true gradient: there is no feedback.")
    return [children[i - 1][0] for i in starts[1:]]


def _places_of(model: nn.Module, module: nn.Module, names: Sequence[str]) -> list[str]:
    """Return all names of a module that stands in several places, in the order in which a sequential model calls it."""
    everywhere = [name for name, part in model.named_modules(remove_duplicate=False) if part is module]
    if len(everywhere) > 1 and not (
        isinstance(model, nn.Sequential) and all(model._modules.get(name) is module for name in everywhere)
    ):
        raise InputError(
            f"{' and '.join(everywhere)} are one {type(module).__name__}, whose calls cannot be told apart: give each "
            f"place a module of its own, or name {names[0]} alone by layers=, which cuts after every call."
        )
    return everywhere


def _cosine(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return math.nan
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan
