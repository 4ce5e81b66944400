"""Which calls of torch's functions use which parameters, with what goes in: seen while the model runs.

Layers are found where they are computed, not where they are declared: attention that hands its weights to a function,
a module that is called twice, a tensor that two modules share or that a model keeps by itself are all calls with a
parameter among the arguments. Slices, reshapes and transposes of a parameter are followed back to it.
"""

from __future__ import annotations

import functools
import types as python_types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvature.objective.steady_draws import inside
from curvature.per_example.forms import Factors, Form, Scattered
from curvature.per_example.layout import Build, Examples, Layout
from curvature.per_example.row_order import reads_number, rows_stay
from curvature.per_example.rules import RULES, Claim

__all__ = ["Capture", "Use"]

_T = torch.Tensor
_TRANSPOSES = {_T.t, torch.t, *(getattr(_T, name).__get__ for name in ("T", "mT"))}
_VIEWS = {
    *(_T.__getitem__, _T.view, _T.reshape, _T.flatten, _T.squeeze, _T.unsqueeze, _T.transpose, _T.permute, _T.expand),
    *(_T.expand_as, _T.narrow, _T.select, _T.chunk, _T.split, _T.unflatten, _T.view_as, _T.contiguous),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.narrow),
    *(torch.select, torch.chunk, torch.split, torch.unflatten, torch.movedim, _T.movedim, torch.swapaxes, _T.repeat),
    *_TRANSPOSES,
}
_CASTS = {_T.to, _T.type, _T.type_as, _T.float, _T.double, _T.half, _T.bfloat16}
_MATRIX_PRODUCTS = {F.linear, torch.matmul, _T.matmul}
_JOINS = {torch.cat, torch.concat, torch.concatenate}


@dataclass(frozen=True)
class _Place:
    """A tensor that is a parameter or a rearrangement of its entries."""

    tensor: Tensor  # kept alive, for its id is the key it is found by
    parameter: int
    index: Callable[[], Tensor] | None = None
    """Where its entries lie in the parameter, in its shape; None where it is the parameter."""
    transposed: bool = False
    """Whether it is the parameter's transpose and nothing else."""
    source: int | None = None
    """The use that made it, if it is the output of an embedding of something that examples may share."""


@dataclass(frozen=True)
class Use:
    """One use of a parameter by one call."""

    kind: str
    parameter: int
    edge: GradientEdge
    """Where the gradient in the call's output can be had."""
    shape: tuple[int, ...]
    """Of the call's output; the gradient may come in another."""
    place: _Place
    build: Build

    def form(self, delta: Tensor, num_examples: int, layout: Layout, parameter: Tensor) -> Form | None:
        """Return the per-example gradients of the parameter from this use, or None if they cannot be told apart.

        Args:
            delta: gradient in the call's output, in the dtype to compute in.
            num_examples: N.
            layout: where the examples lie in `delta`.
            parameter: the tensor that the place leads to.
        """
        delta = delta.reshape(self.shape)
        if self.place.index is None:
            return self.build(delta, Examples(num_examples, layout))
        index = self.place.index()
        repeated = index.ndim == delta.ndim and len(index) == num_examples and bool((index == index[:1]).all())
        form = self.build(delta, Examples(num_examples, layout, repeated))
        if form is None:
            return None
        if self.place.transposed and isinstance(form, Factors):
            swapped = form.transposed()
            if swapped is not None:
                return swapped
        return Scattered(form, (index[0] if repeated else index).reshape(-1), parameter.numel())


class Capture(TorchFunctionMode):
    """While active, records the uses of some tensors.

    Attributes:
        uses: in the order of the calls.
        moves_rows: whether a function was called that may move examples to other rows, by what the data are (sorting,
            indexing with tensors, anything unknown, anything after Python has read a number).

    Args:
        parameters: the tensors to look for.
        rules: the functions that are known.
    """

    def __init__(self, parameters: Sequence[Tensor], rules: Mapping[Any, Callable[..., list[Claim]]] = RULES) -> None:
        super().__init__()
        self._rules = rules
        self.uses: list[Use] = []
        self.moves_rows = self._may_branch = False
        self._places = {id(p): _Place(p, i) for i, p in enumerate(parameters)}

    @property
    def structure(self) -> tuple[tuple[str, int], ...]:
        """What was used by what, in which order."""
        return tuple((use.kind, use.parameter) for use in self.uses)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if reads_number(func):
            self._may_branch = True
        elif not (func in self._rules or rows_stay(func, args, self._places)):
            self.moves_rows = True
        out = self._call(func, args, kwargs)
        if self._may_branch and isinstance(out, Tensor) and out.requires_grad and out.numel() > 1:
            self.moves_rows = True
        return out

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        rule = self._rules.get(func)
        operands = args[0] if args and func in _JOINS else (*args, *kwargs.values())
        placed = [self._places.get(id(t)) for t in operands if isinstance(t, Tensor)]
        if not any(placed):
            return func(*args, **kwargs)
        if rule is not None:
            claims = _claims(rule, args, kwargs)
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                self._record(func, out, claims)
                if func is F.embedding and len(claims) == 1 and out.grad_fn is not None:
                    self._follow_embedding(out, *args[:2])
            return out
        if func in _VIEWS and placed[0] is not None:
            return self._follow_view(func, placed[0], args, kwargs)
        if func in _CASTS and placed[0] is not None:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):  # not a dtype's name
                self._places[id(out)] = replace(placed[0], tensor=out)
            return out
        if isinstance(func, python_types.FunctionType) and func.__module__ == F.__name__:
            with self:
                return inside(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(self, func: Any, out: Tensor, claims: Sequence[Claim]) -> None:
        with torch._C.DisableTorchFunction():  # a mode below would be asked at each attribute
            if out.grad_fn is None:
                return
            edge, shape = get_gradient_edge(_computed(out) if func in _MATRIX_PRODUCTS else out), tuple(out.shape)
            for claim in claims:
                place = self._places.get(id(claim.tensor))
                if place is not None and place.tensor.requires_grad:
                    self.uses.append(Use(func.__name__, place.parameter, edge, shape, place, claim.build))

    def _follow_embedding(self, out: Tensor, index: Tensor, table: Tensor) -> None:
        """Positions are often looked up once for all examples: then what is looked up is a part of the table."""
        place = self._places.get(id(table))
        if place is not None and place.index is None and place.tensor.requires_grad:
            width, source = table.shape[1], len(self.uses) - 1

            def entries() -> Tensor:
                return index[..., None] * width + torch.arange(width, device=index.device)

            self._places[id(out)] = _Place(out, place.parameter, entries, source=source)

    def _follow_view(self, func: Any, place: _Place, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = func(*args, **kwargs)
        shape = place.tensor.shape

        def entries(part: int | None) -> Tensor:
            numbers = torch.arange(place.tensor.numel(), device=place.tensor.device).view(shape)
            with torch._C.DisableTorchFunction():
                moved = func(numbers if place.index is None else place.index(), *args[1:], **kwargs)
            return moved if part is None else moved[part]

        matrix = place.index is None and place.tensor.ndim == 2
        for i, part in enumerate([out] if isinstance(out, Tensor) else out):
            if part is place.tensor:
                continue
            swaps = func in (_T.transpose, torch.transpose) and part.shape == shape[::-1]
            at = functools.partial(entries, None if isinstance(out, Tensor) else i)
            self._places[id(part)] = _Place(
                part, place.parameter, at, matrix and (func in _TRANSPOSES or swaps), place.source
            )
        return out


def _computed(out: Tensor) -> Tensor:
    """Return what `out`, a matrix product, is a view of.

    The graph goes past the view, if the output is overwritten in place later, but not past what was computed.
    """
    base = out._base
    if base is None or base.grad_fn is None or base.numel() != out.numel():
        return out
    return base if base.is_contiguous() and out.is_contiguous() else out  # else entries come in another order


def _claims(rule: Callable[..., list[Claim]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Claim]:
    try:
        return rule(*args, **kwargs)
    except TypeError:  # a form of the call that the rule does not know, such as out=
        return []
