"""Tensors that reach a module, or leave it, otherwise than as its arguments and its result: found while it runs.

A module that is recorded as one function of its arguments (`module_graph`) takes whatever else it uses for a constant,
and what it leaves elsewhere is one for all others. That is right only of what depends neither on parameters nor on
inputs that do, so every operation on it is looked at, in each batch: a branch that few batches take is seen when it is
taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from curvature.errors import CheckFailedError

__all__ = ["Leaks"]

_MARK = "_curvature_made_in"
_CONSTANT = (Tensor.detach, Tensor.data.__get__, torch.detach)  # type: ignore[attr-defined] # a descriptor
_QUESTIONS = {"__get__", "dim", "is_complex", "is_floating_point", "numel", "size"}  # which change nothing
_NO_TENSORS = {bool, int, float, complex, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout}


class Leaks(TorchFunctionMode):
    """Watches operations while modules run one at a time.

    Raises:
        CheckFailedError: for an operation on a tensor that depends on parameters and came another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: nn.Module | None = None
        self._run: object | None = None
        self._is_paused = False

    @contextlib.contextmanager
    def inside(self, module: nn.Module, given: Sequence[Tensor]) -> Iterator[None]:
        """Watch a module that is run for the first time; `given` are those of its tensors that are no constants."""
        before = self._inside, self._run
        self._inside, self._run = module, object()
        try:
            for tensor in given:
                setattr(tensor, _MARK, self._run)
            yield
        finally:
            self._inside, self._run = before

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        """Note what a module returns."""
        for tensor in tensors:
            vars(tensor).pop(_MARK, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not look while a module is run again."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def refuse_inside(self, what: str) -> None:
        """Raise CheckFailedError for something that a module may not use while it runs."""
        if self._inside is not None and not self._is_paused:
            raise _refusal(self._inside, what)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        asks = name in _QUESTIONS
        result = func(*args, **kwargs) if asks else None
        if asks and type(result) in _NO_TENSORS:
            return result
        tensors = _tensors((*args, *kwargs.values()))
        marks = [vars(t).get(_MARK) for t in tensors]
        known = {id(self._run)} if self._run is not None else set()
        foreign = any(m is not None and id(m) not in known for m in marks)
        foreign = foreign or (
            self._inside is not None and any(t.requires_grad and t.grad_fn is not None for t in tensors)
        )
        if not asks:
            result = func(*args, **kwargs)
        if func in _CONSTANT:
            return result
        made = _tensors((result,))
        if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            made = [*made, args[0]]
        made = [t for t in made if t.is_floating_point() or t.is_complex()]
        if foreign and made:
            raise _refusal(self._inside, "a tensor")
        if self._run is not None and any(m is self._run for m in marks):
            for t in made:
                setattr(t, _MARK, self._run)
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values and in containers among them; most are no containers, which are slow to enter."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) not in _NO_TENSORS:
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _refusal(module: nn.Module | None, what: str) -> CheckFailedError:
    who = "the model or its loss uses" if module is None else f"a {type(module).__name__} uses"
    return CheckFailedError(
        f"{who} {what} that depends on parameters and came otherwise than through the arguments and the result of the "
        "forward of some module (an attribute, a list, a data class, a weight of another module): taken module by "
        "module it would be a constant, unlike in the model's own backward pass. Hand it over in tensors, tuples, "
        "lists or dicts, or give a memory_budget that whole parameters fit in."
    )
