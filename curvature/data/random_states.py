"""Random states that code of others may draw from: kept, set and put back.

These are the global states of torch (CPU, and the given GPUs), NumPy and Python, and generators that a data loader, its
samplers, its data set or its transforms hold.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor

from curvature.data.tensors import attributes_of
from curvature.environment.device import default_generators
from curvature.environment.lock import one_at_a_time

__all__ = ["RandomStates", "generators_of", "random_states_kept", "unnoticed"]

_MT, _WORDS = np.random.MT19937, 624 * 4 + 4  # its state: the key and the place in it
_MANY = 64  # a list of more items holds data, not samplers or transforms


class RandomStates:
    """Random states at the time this was made; `restore` puts them back.

    Args:
        devices: those whose states count, beside the CPU; None all that are in use.
        generators: of torch, NumPy or Python, beside the global ones.
    """

    def __init__(self, devices: Iterable[torch.device] | None = (), generators: Iterable[Any] = ()) -> None:
        self._torch = [(g, g.get_state()) for g in default_generators(devices)]
        self._numpy = _NumPyState()
        self._python = random.getstate()
        self._held = [(g, _state(g)) for g in generators]

    def restore(self) -> None:
        for generator, state in self._torch:
            generator.set_state(state)
        self._numpy.restore()
        random.setstate(self._python)
        for generator, state in self._held:
            _set_state(generator, state)

    def seed(self, seed: int) -> RandomStates:
        """Set the states that were kept, but those of held generators, by a seed; return what they are then."""
        for generator, _ in self._torch:
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        seeded = copy.copy(self)
        seeded._torch = [(g, g.get_state()) for g, _ in self._torch]
        seeded._numpy, seeded._python = _just_seeded(seed, type(mtrand.get_bit_generator()))
        return seeded

    def same_as(self, other: RandomStates) -> bool:
        """Whether no number was drawn between the two."""
        return (
            all(torch.equal(a, b) for (_, a), (_, b) in zip(self._torch, other._torch, strict=True))
            and self._python == other._python
            and self._numpy.same_as(other._numpy)
            and all(_alike(a, b) for (_, a), (_, b) in zip(self._held, other._held, strict=True))
        )


@contextlib.contextmanager
def random_states_kept() -> Iterator[RandomStates]:
    """Put back all global random states that are in use, those of GPUs included, after what runs inside."""
    states = RandomStates(None)
    try:
        yield states
    finally:
        states.restore()


class _NumPyState:
    """NumPy's global state. Its own accessors go entry by entry and take longer than the loss of a small model."""

    _without_gaussian: ClassVar[deque[bytes]] = deque(maxlen=4)  # words beside which no half of a normal pair is held

    def __init__(self) -> None:
        self._words = self._read()
        self._full: Any = None
        if self._words is None or self._words not in self._without_gaussian:
            self._full = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what others draw from
            if self._words is not None and not self._full["has_gauss"]:
                self._without_gaussian.append(self._words)
                self._full = None

    @staticmethod
    def _read() -> bytes | None:
        generator = mtrand.get_bit_generator()
        return ctypes.string_at(generator.ctypes.state_address, _WORDS) if type(generator) is _MT else None

    def restore(self) -> None:
        if self._full is not None:
            np.random.set_state(self._full)  # noqa: NPY002
        elif self._words is not None and self._words != self._read():
            generator = mtrand.get_bit_generator()
            if type(generator) is not _MT:
                mtrand.set_bit_generator(generator := _MT())
            np.random.seed(0)  # noqa: NPY002 - drops the other half of a normal pair
            ctypes.memmove(generator.ctypes.state_address, self._words, _WORDS)

    def same_as(self, other: _NumPyState) -> bool:
        return self._words == other._words and (self._full is other._full or _alike(self._full, other._full))


@lru_cache(8)
def _just_seeded(seed: int, kind: type) -> tuple[_NumPyState, Any]:
    """Return NumPy's and Python's states, which were seeded just now: reading them takes longer than seeding."""
    del seed, kind
    return _NumPyState(), random.getstate()


def unnoticed(data: Iterable[Any], stream: list[RandomStates]) -> Iterator[Any]:
    """Yield from `data` under random states of their own: whoever trains on the same loader draws as if nobody looked.

    Args:
        data: a loader; what is drawn while it yields comes from the stream.
        stream: the states that the last pass ended with; empty before the first, which starts from the present ones.
    """
    held = generators_of(data)

    def drawing(call: Any) -> Any:
        with one_at_a_time:
            outside = RandomStates(None, held)
            try:
                if stream:
                    stream[0].restore()
                return call()
            finally:
                stream[:] = [RandomStates(None, held)]
                outside.restore()

    batches = drawing(lambda: iter(data))
    end = object()
    while (batch := drawing(lambda: next(batches, end))) is not end:
        yield batch


def generators_of(holder: Any) -> list[Any]:
    """Return the generators that an object holds, in attributes of attributes, short lists and closures."""
    found, seen, stack = [], {}, [holder]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept alive, for its id is the key
        if isinstance(item, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(item)
        elif not isinstance(item, (Tensor, np.ndarray, torch.nn.Module)):
            stack += _parts(item)
    return found


def _parts(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return list(item.values()) if len(item) <= _MANY else []
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item) if len(item) <= _MANY else []
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    return list(attributes_of(item).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _state(generator: Any) -> Any:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(np.array_equal(a, b))
