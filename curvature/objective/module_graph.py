"""Modules whose parameters are there only while they run: gathered, used and dropped, in each pass through the graph.

A module y = f(x, W) is recorded by its inputs. Its derivatives f'(x, W)'u, and those of them in a direction, are
computed by running it again on parameters that are gathered again (checkpointing). So a rank holds the parameters of
one module at a time, and their part of a vector and of a product. What comes out for W is not passed on: the
parameters are the ends of the graph, and contributions to them are summed over ranks and added up where they arise.

Three passes go through the graph of a product, and each knows which it is: "build" makes gradients that nobody reads,
as functions of what they are differentiated in; "push" differentiates those in the direction of a vector; "final"
contributes to the product, or to a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvature.autograd.backward import differentiable, ends_of, no_autocast, pull_back
from curvature.data.random_states import RandomStates
from curvature.errors import InputError
from curvature.fingerprints.digest import version
from curvature.objective.leaks import Leaks
from curvature.objective.linear_call import Linear
from curvature.objective.standing_in import renew_weights

__all__ = ["Call", "Exchange", "whole_in_graph"]

Pass = Literal["build", "push", "final"]


class Exchange(Protocol):
    """What modules ask of the walk over the data that they run in; parameters are named by their places."""

    which: Pass
    parts: list[Tensor]
    """This rank's parts of all parameters, the leaves of the graph."""
    leaks: Leaks
    """Looks for tensors that go other ways."""

    def parameters(self, places: tuple[int, ...]) -> list[Tensor]:
        """Return whole parameters."""

    def directions(self, places: tuple[int, ...]) -> dict[int, Tensor]:
        """Return the parts that belong to them of the vector that is multiplied, whole; of those that it has."""

    def contribute(self, places: tuple[int, ...], products: Mapping[int, Tensor]) -> None:
        """Add to the result, summed over ranks, what this rank has of it."""


class Call:
    """One call of a module, to be repeated.

    Args:
        exchange: the walk.
        module: whose own parameters are all that it and its submodules have.
        keys: names of its parameters, and their places.
        forward: its forward function.
        dtype: that parameters are cast to, if any.
    """

    def __init__(
        self, exchange: Exchange, module: nn.Module, keys: Mapping[str, int], forward: Any, dtype: torch.dtype | None
    ) -> None:
        self.exchange, self.module, self.keys, self.forward, self.dtype = exchange, module, keys, forward, dtype
        self.places = tuple(sorted(set(keys.values())))
        self.device = exchange.parts[self.places[0]].device
        self.linear = Linear.of(module, keys, self.places, forward)
        kind = self.device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._random: RandomStates | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, recorded."""
        self._leaves, self._inputs = tree_flatten((args, kwargs))
        self._tensors = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        tensors = [self._leaves[i] for i in self._tensors]
        for i in self._tensors:
            self._leaves[i] = None  # autograd holds them
        before = RandomStates([self.device])
        found = _Module.apply(self, len(tensors), *tensors, *(self.exchange.parts[i] for i in self.places))
        self._random = None if before.same_as(RandomStates([self.device])) else before
        outputs = list(self._others)
        for i, tensor in zip(self._returned, found, strict=True):
            outputs[i] = tensor
        return tree_unflatten(outputs, self._outputs)

    def run(self, inputs: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that the module returns for these tensors, on these parameters."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._tensors, inputs, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self._inputs)
        values = dict(zip(self.places, whole, strict=True))
        held = _holding(self.module, {key: _cast(values[i], self.dtype) for key, i in self.keys.items()})
        enabled, dtype = self._autocast
        with torch.autocast(self.device.type, enabled=enabled, dtype=dtype), self._as_before(), held:
            self._others, self._outputs = tree_flatten(self.forward(*args, **kwargs))
        self._returned = [i for i, leaf in enumerate(self._others) if isinstance(leaf, Tensor)]
        found = [self._others[i] for i in self._returned]
        for i in self._returned:
            self._others[i] = None
        return found

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        """Draw the random numbers of the first run."""
        if self._random is None:
            yield
            return
        now = RandomStates([self.device])
        try:
            self._random.restore()
            yield
        finally:
            now.restore()

    def pulled_back(
        self, inputs: Sequence[Tensor], whole: Sequence[Tensor], vectors: Sequence[Tensor | None], *, again: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the derivatives along vectors on the outputs in inputs and parameters, None for those without."""
        with torch.enable_grad(), self.exchange.leaks.paused():
            outputs = self.run(inputs, whole)
            pairs = [(y, u) for y, u in zip(outputs, vectors, strict=True) if u is not None and y.requires_grad]
            if not pairs:
                return (None,) * (len(inputs) + len(whole))
            with no_autocast(self.device):
                functions, along = [y for y, _ in pairs], [u for _, u in pairs]
                return _derivatives(functions, along, (*inputs, *whole), create_graph=again)


def _derivatives(
    functions: Sequence[Any], vectors: Sequence[Tensor], inputs: Sequence[Tensor | None], create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the derivatives in those inputs that record; None for others."""
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    chosen = [x for x in inputs if x is not None and x.requires_grad]
    if functions and wanted:
        parts = pull_back(functions, chosen, vectors, create_graph=create_graph, retain_graph=create_graph)
        for i, part in zip(wanted, parts, strict=True):
            found[i] = part
    return tuple(found)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


@contextlib.contextmanager
def _holding(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Have a module hold these parameters."""
    before = module._parameters
    try:
        held: dict[str, Any] = {**dict.fromkeys(before), **values}
        module._parameters = held
        renew_weights(module)
        yield
    finally:
        module._parameters = before
        renew_weights(module)


def _continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(tensor: Tensor, record: bool) -> Tensor:
    return tensor.detach().requires_grad_(record)


class _Module(torch.autograd.Function):
    """The outputs of a module as a function of its inputs and of the parts of its parameters."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, *tensors: Tensor) -> Any:
        ctx.call, ctx.count = call, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        inputs = [t.detach() for t in tensors[:count]]  # which share the counts of writes
        before = [version(t) for t in inputs]
        W, leaks = call.exchange.parameters(call.places), call.exchange.leaks
        moving = [t for t, given in zip((*inputs, *W), tensors, strict=True) if given.requires_grad]
        with leaks.inside(call.module, moving):
            outputs = call.run(inputs, W)
            leaks.hand_over(outputs)
        if before != [version(t) for t in inputs]:
            raise InputError(
                f"a {type(call.module).__name__} writes into a tensor that it is given, and modules whose parameters "
                "are gathered when they run are run again on the same tensors: write x * w for x.mul_(w), or give a "
                "memory_budget that whole parameters fit in."
            )
        ctx.mark_non_differentiable(*(y for y in outputs if not _continuous(y)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        return None, None, *_ModuleBackward.apply(ctx.call, ctx.count, len(vectors), *vectors, *ctx.saved_tensors)


class _ModuleBackward(torch.autograd.Function):
    """f'(x, W)'u as a function of u, x and the parts of W."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, num_vectors: int, *given: Any) -> Any:
        ctx.call, ctx.count, ctx.num_vectors = call, count, num_vectors
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        vectors, inputs, parts = _separated(given, num_vectors, count)
        exchange, final = call.exchange, call.exchange.which == "final"
        if call.linear is not None and call.linear.takes(inputs, vectors, parts):
            with exchange.leaks.paused():
                found, W = call.linear.first(exchange, inputs[0], vectors[0], parts), []
        else:
            whole = exchange.parameters(call.places)
            x = [_leaf(t, t.requires_grad) for t in inputs]
            W = [_leaf(t, final and part.requires_grad) for t, part in zip(whole, parts, strict=True)]
            del whole
            found = call.pulled_back(x, W, vectors, again=False)
        if final:
            del W  # of the size of the module, while ranks exchange what has come out
            _contribute(call, found[count:])
            return *found[:count], *(None for _ in parts)
        return *found[:count], *(_nothing(part) if part.requires_grad else None for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        call, count = ctx.call, ctx.count
        if call.exchange.which == "build":
            raise InputError(
                "the model differentiates in its forward pass, and modules whose parameters are gathered when they run "
                "have two derivatives: give a memory_budget that whole parameters fit in."
            )
        vectors, inputs, parts = _separated(ctx.saved_tensors, ctx.num_vectors, count)
        exchange, final = call.exchange, call.exchange.which == "final"
        if call.linear is not None and call.linear.takes(inputs, vectors, parts):
            with exchange.leaks.paused():
                found = call.linear.second(exchange, inputs[0], vectors[0], parts, directions)
        else:
            found = _second(call, inputs, vectors, parts, directions)
        num_vectors = len(vectors)
        if not final:
            return None, None, None, *found[:num_vectors], *(None for _ in (*inputs, *parts))
        _contribute(call, found[num_vectors + count :])
        return None, None, None, *found[: num_vectors + count], *(None for _ in parts)


def _second(call: Call, inputs: Any, vectors: Any, parts: Any, directions: Any) -> tuple[Tensor | None, ...]:
    """Return what the derivatives along vectors change by along directions, in vectors, inputs and parameters."""
    exchange, count = call.exchange, len(inputs)
    u = [None if t is None else _leaf(t, _continuous(t)) for t in vectors]
    x = [_leaf(t, t.requires_grad) for t in inputs]
    W = [_leaf(t, part.requires_grad) for t, part in zip(exchange.parameters(call.places), parts, strict=True)]
    first = ends_of(call.pulled_back(x, W, u, again=True))  # before what is of the size of the module, too
    asked = any(d is not None for d in directions[count:])
    along = exchange.directions(call.places) if asked else {}
    cotangents = [*directions[:count], *(along.get(i) for i in call.places)]
    pairs = [(g, c) for g, c in zip(first, cotangents, strict=True) if g is not None and c is not None]
    ends, vectors_on = differentiable([g for g, _ in pairs], [c for _, c in pairs])
    del first, pairs, along, cotangents
    return _derivatives(ends, vectors_on, [*u, *x, *W] if exchange.which == "final" else u)


def _nothing(part: Tensor) -> Tensor:
    """Return zeros in the shape of a part, without its memory."""
    return part.new_zeros(()).expand(part.shape)


def _separated(given: Sequence[Any], num_vectors: int, count: int) -> tuple[Any, Any, Any]:
    return given[:num_vectors], given[num_vectors : num_vectors + count], given[num_vectors + count :]


def _contribute(call: Call, products: Sequence[Tensor | None]) -> None:
    found = {i: p for i, p in zip(call.places, products, strict=True) if p is not None}
    if found:
        call.exchange.contribute(call.places, found)


# -- parameters that something else than their own module uses -------------------------------------------------------


def whole_in_graph(exchange: Exchange, place: int) -> Tensor:
    """Return a whole parameter, recorded; it is held as long as the graph."""
    found: Tensor = _Whole.apply(exchange, place, exchange.parts[place])
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, place: int, part: Tensor) -> Tensor:
        ctx.exchange, ctx.place = exchange, place
        ctx.save_for_backward(part)
        return exchange.parameters((place,))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (part,) = ctx.saved_tensors
        if ctx.exchange.which == "final":
            ctx.exchange.contribute((ctx.place,), {ctx.place: gradient})
            return None, None, None
        return None, None, _WholeBackward.apply(ctx.exchange, ctx.place, gradient, part)


class _WholeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, place: int, gradient: Tensor, part: Tensor) -> Tensor:
        del gradient
        ctx.exchange, ctx.place = exchange, place
        return _nothing(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> Any:
        del direction
        return None, None, ctx.exchange.directions((ctx.place,))[ctx.place], None
