"""What a caller hands in, compared with annotations: a sentence at the door instead of an error deep inside.

`checked` looks at kinds only (a number, a string, a tensor, an operator, ...); ranges and shapes are the function's.
Where several ranks make the call together, they compare what they were given.
"""

from __future__ import annotations

import collections.abc as containers
import contextlib
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from curvature.errors import InputError

__all__ = ["checked", "checked_fields"]

C = TypeVar("C", bound=type)
P = ParamSpec("P")
R = TypeVar("R")
_REFUSED = object()
_MOST_CHECKED = 100  # entries of a sequence


@dataclass(frozen=True)
class _Kind:
    """What an annotation allows."""

    text: str
    """For people: "an integer"."""
    take: Callable[[Any], Any]
    """Returns the value, converted where that loses nothing, or `_REFUSED`."""


def checked(function: Callable[P, R], *, alike: bool = False) -> Callable[P, R]:
    """Return the function with arguments of another kind than annotated refused by an `InputError`.

    NumPy's numbers and tensors without dimensions pass as numbers. What an annotation does not tell
    (`Any`, or a name that exists for type checkers alone) is not checked.

    Ranks that share an argument with an attribute `ranks` must give the same to a function that draws random numbers,
    or to any `alike`; where they do not, or one of them is refused, all of them raise.
    """
    signature: inspect.Signature | None = None
    kinds: dict[str, _Kind] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal kinds, signature
        if signature is None:  # not before everything is imported
            kinds, signature = _kinds(function), inspect.signature(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing or unknown
        with _among_ranks(function, bound, signature, alike=alike):
            for name, value in bound.arguments.items():
                if name in kinds:
                    bound.arguments[name] = _taken(name, value, kinds[name])
            return function(*bound.args, **bound.kwargs)

    return call


def _among_ranks(
    function: Callable[..., Any], bound: inspect.BoundArguments, signature: inspect.Signature, *, alike: bool
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which ranks that share an argument are given the same, and all fail where one does."""
    if alike or "generator" in signature.parameters:
        for value in bound.arguments.values():
            ranks = getattr(value, "ranks", None)
            if ranks is not None and hasattr(ranks, "given"):
                defaults = {p.name: p.default for p in signature.parameters.values()}
                given = {name: v for name, v in (defaults | bound.arguments).items() if v is not value}
                comparison: contextlib.AbstractContextManager[None] = ranks.given(function.__qualname__, given)
                return comparison
    return contextlib.nullcontext()


def checked_fields(cls: C) -> C:
    """Return the dataclass with what its fields are set to checked, as `checked` does."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


def _taken(name: str, value: Any, kind: _Kind) -> Any:
    """Return the value as the annotation has it.

    Raises:
        InputError: if it is of another kind.
    """
    taken = kind.take(value)
    if taken is not _REFUSED:
        return taken
    hint = ""
    if any(cls.__name__ == "Objective" for cls in type(value).__mro__):
        hint = "; take an operator of it, such as HessianOperator(objective)"
    elif isinstance(value, np.ndarray):
        hint = "; torch.from_numpy makes a tensor of it"
    elif isinstance(value, Tensor) and value.layout != torch.strided:
        hint = "; call .to_dense()"
    raise InputError(f"{name} must be {kind.text}, got {_shown(value)}{hint}.")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}, {value.layout}{where}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a huge integer"
        return text if len(text) <= 60 else f"{text[:50]}..."
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"


def _kinds(function: Callable[..., Any]) -> dict[str, _Kind]:
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = parameter.annotation
        try:
            while isinstance(annotation, str):
                annotation = eval(annotation, function.__globals__)
        except (NameError, TypeError):  # imported for type checkers alone
            continue
        if annotation is not parameter.empty and (kind := _kind(annotation)) is not None:
            found[name] = kind
    return found


def _kind(annotation: Any) -> _Kind | None:
    """Return what an annotation allows; None if it does not tell."""
    simple = {None: _NONE, type(None): _NONE, int: _INTEGER, float: _NUMBER, bool: _BOOL, Tensor: _TENSOR}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _one_of(args)
    if origin is Literal:
        options = " or ".join(dict.fromkeys(repr(option) for option in args))
        return _Kind(options, lambda v: v if isinstance(v, str) or any(v is option for option in args) else _REFUSED)
    if origin is containers.Callable or annotation is containers.Callable:
        return _Kind("callable", lambda v: v if callable(v) else _REFUSED)
    if origin in (tuple, list, containers.Sequence, containers.Collection):
        return _sequence(origin, args)
    if origin in (dict, containers.Mapping):
        return _Kind("a mapping", lambda v: v if isinstance(v, containers.Mapping) else _REFUSED)
    if annotation is Any or origin is not None or not isinstance(annotation, type | types.NoneType):
        return None
    if annotation in simple:
        return simple[annotation]
    if annotation is torch.device:
        return _DEVICE
    name = getattr(annotation, "__name__", "")
    if getattr(annotation, "_is_protocol", False):
        return _MATRIX if name == "MatrixLike" else None
    cls: Any = annotation
    text = {
        str: "a string",
        torch.Generator: "a torch.Generator, such as torch.Generator().manual_seed(0)",
        torch.dtype: "a torch.dtype",
    }.get(cls, f"{'an' if name[0] in 'AEIO' else 'a'} {name}")
    return _Kind(text, lambda v: v if isinstance(v, cls) else _REFUSED)


def _one_of(annotations: tuple[Any, ...]) -> _Kind | None:
    if torch.device in annotations:
        annotations = tuple(a for a in annotations if a is not str)
    known = [_kind(annotation) for annotation in annotations]
    kinds = [kind for kind in known if kind is not None]
    if len(kinds) < len(known):
        return None

    def take(value: Any) -> Any:
        for kind in kinds:
            if (taken := kind.take(value)) is not _REFUSED:
                return taken
        return _REFUSED

    texts = [kind.text for kind in kinds]
    return _Kind(texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}", take)


def _sequence(origin: Any, args: tuple[Any, ...]) -> _Kind:
    each = _kind(args[0]) if args and (origin is not tuple or args[-1] is Ellipsis) else None
    length = len(args) if origin is tuple and args and args[-1] is not Ellipsis else None

    def take(value: Any) -> Any:
        if isinstance(value, (str, bytes)) or not isinstance(value, containers.Collection) or isinstance(value, Tensor):
            return _REFUSED
        if isinstance(value, (containers.Mapping, np.ndarray)) or (length is not None and len(value) != length):
            return _REFUSED
        if each is not None and isinstance(value, (list, tuple)) and len(value) <= _MOST_CHECKED:
            taken = [each.take(entry) for entry in value]
            if any(entry is _REFUSED for entry in taken):
                return _REFUSED
            return value if all(a is b for a, b in zip(taken, value, strict=True)) else type(value)(taken)
        return value

    of = f", each {each.text}" if each is not None else f" of {length}" if length is not None else ""
    return _Kind(f"a sequence{of}", take)


def _integer(value: Any) -> Any:
    if (
        isinstance(value, Tensor)
        and value.ndim == 0
        and not value.is_meta
        and value.dtype in (torch.int32, torch.int64)
    ):
        return int(value)
    if type(value) is bool or not isinstance(value, numbers.Integral):
        return _REFUSED
    return int(value)


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta and value.is_floating_point():
        value = float(value)
    real = isinstance(value, numbers.Real) and value is not True and value is not False
    if not real:
        return _REFUSED
    try:
        return value if type(value) is int and math.isfinite(value) else float(value)
    except OverflowError:  # an integer beyond all floats
        return _REFUSED


def _tensor(value: Any) -> Any:
    usable = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_nested
    return value if usable else _REFUSED


def _matrix(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if not (value.is_meta or value.is_nested) else _REFUSED
    names = ("shape", "dtype", "device", "__matmul__")
    usable = not isinstance(value, type) and all(hasattr(value, name) for name in names)
    return value if usable and isinstance(value.dtype, torch.dtype) else _REFUSED


def _device(value: Any) -> Any:
    if not isinstance(value, (str, torch.device)):
        return _REFUSED
    try:
        return value if torch.empty(0, device=value).device.type != "meta" else _REFUSED
    except Exception:  # backends raise what they like
        return _REFUSED


_NONE = _Kind("None", lambda v: v if v is None else _REFUSED)
_INTEGER = _Kind("an integer", _integer)
_NUMBER = _Kind("a number", _number)
_BOOL = _Kind("True or False", lambda v: bool(v) if isinstance(v, (bool, np.bool_)) else _REFUSED)
_TENSOR = _Kind("a dense tensor", _tensor)
_DEVICE = _Kind("a device that there is here, such as 'cpu'", _device)
_MATRIX = _Kind("a matrix or an operator, with shape, dtype, device and @", _matrix)
