"""A closure evaluated several times in one step, as if it had been evaluated once.

Line searches, rejected steps and perturbed points evaluate a closure again. Each time it must be the same function:
random numbers start where the first evaluation started, and so do the buffers that forward passes move (running
statistics, vectors of power iterations). What stays behind is the trace of the first evaluation alone, and none of one
that is broken off.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from curvature.data.random_states import RandomStates
from curvature.environment.autocast import as_around
from curvature.environment.device import default_generators

__all__ = ["Attempts", "RandomStreams", "RepeatedEvaluation", "RunningBuffers"]

_Store = dict[str, Tensor | None]


@dataclass
class _Call:
    """A forward pass under way, of the outermost module."""

    module: nn.Module
    places: list[tuple[_Store, str, Tensor]]
    """Where buffers lay when it began, and which."""
    again: bool
    depth: int = 1
    """The module may call itself."""


class RunningBuffers:
    """Lets modules move their buffers in the first evaluation, and copies of them afterwards.

    Modules are found as they are called, inside `watched()`, where every forward pass outside of an `evaluation()` (the
    recomputation of checkpointed layers) works on copies, too.
    """

    def __init__(self) -> None:
        self._at_first: dict[int, tuple[Tensor, Tensor]] = {}
        self._replaced: list[tuple[_Store, str, Tensor, Tensor]] = []
        self._copies: dict[int, Tensor] = {}
        self._places: dict[tuple[int, str], tuple[_Store, str]] = {}
        self._call: _Call | None = None
        self._first = False
        self._evaluated = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch all forward passes for as long as the closure may be evaluated."""
        _WATCHERS.add(self)
        try:
            with warnings.catch_warnings():  # the wrapper of torch.compile calls hooks once more, which does no harm
                warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
                yield
        finally:
            _WATCHERS.remove(self)
            self._close()  # a forward pass was broken off

    @contextlib.contextmanager
    def evaluation(self, *, moves: bool = True) -> Iterator[None]:
        """Evaluate once, autocast as around the step; the first evaluation moves the buffers, unless told not to."""
        first = self._first = moves and not self._evaluated
        self._evaluated |= moves
        self._copies.clear()
        try:
            with as_around():
                yield
        except BaseException:
            if first:
                self._close()
                self.restore()
                self._evaluated = False
            raise
        finally:
            self._close()
            self._first = False
            self._copies.clear()

    def restore(self) -> None:
        """Put all buffers back to where they were before the first evaluation."""
        with torch.no_grad():
            for buffer, content in self._at_first.values():
                if not buffer.is_inference():
                    buffer.copy_(content)
        for store, name, buffer, now in self._replaced:
            if store.get(name) is now:  # not where another watcher had put its copy
                store[name] = buffer

    def places(self) -> list[tuple[_Store, str]]:
        """Return where the modules that were called hold buffers."""
        return list(self._places.values())

    def _is_ours(self) -> bool:
        """Whether a call is of this thread, or of a backward pass in a thread of autograd's."""
        if threading.get_ident() == self._thread:
            return True
        return isinstance(threading.current_thread(), threading._DummyThread)

    def begin(self, module: nn.Module) -> None:
        """Look at the buffers before a forward pass."""
        if not self._is_ours():
            return
        if self._call is not None:
            self._call.depth += module is self._call.module
            return
        places = [
            (part._buffers, name, buffer)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self._call = _Call(module, places, again=not self._first)
        self._places.update({(id(store), name): (store, name) for store, name, _ in places})
        for store, name, buffer in places:
            if self._first:
                self._at_first.setdefault(id(buffer), (buffer, buffer.detach().clone()))
            else:
                store[name] = self._copy(buffer)

    def _copy(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self._copies:
            content = self._at_first.setdefault(id(buffer), (buffer, buffer.detach().clone()))[1]
            self._copies[id(buffer)] = content.clone()
        return self._copies[id(buffer)]

    def end(self, module: nn.Module) -> None:
        """Put the buffers back where the outermost forward pass ends."""
        if self._call is not None and module is self._call.module and self._is_ours():
            self._call.depth -= 1
            if self._call.depth == 0:
                self._close()

    def _close(self) -> None:
        call, self._call = self._call, None
        for store, name, buffer in () if call is None else call.places:
            now = store.get(name)
            assert call is not None
            if call.again:
                if now is not None:
                    self._copies[id(buffer)] = now
                store[name] = buffer
            elif now is not None and now is not buffer:  # replaced by a new tensor instead of written to
                self._at_first.setdefault(id(now), (now, self._at_first[id(buffer)][1]))
                self._replaced.append((store, name, buffer, now))


class _Watchers:
    """All who watch. What they put in place of buffers is stacked: calls end for the latest first."""

    def __init__(self) -> None:
        self._all: list[RunningBuffers] = []
        self._handles: list[Any] = []
        self._lock = threading.Lock()

    def add(self, watcher: RunningBuffers) -> None:
        with self._lock:
            self._all.append(watcher)
            if not self._handles:
                self._handles = [
                    register_module_forward_pre_hook(self._begin),
                    register_module_forward_hook(self._end, always_call=True),
                ]

    def remove(self, watcher: RunningBuffers) -> None:
        with self._lock:
            self._all.remove(watcher)
            while not self._all and self._handles:
                self._handles.pop().remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        for watcher in self._all:
            watcher.begin(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        for watcher in reversed(self._all):
            watcher.end(module)


_WATCHERS = _Watchers()


class RandomStreams:
    """The random streams of torch, NumPy and Python: every evaluation starts where the first did."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.devices = {p.device for p in params}
        self.before = RandomStates(self.devices)
        self.after: RandomStates | None = None
        self._moved = False

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        self.before.restore()
        try:
            yield
        except BaseException:
            self.before.restore()
            raise
        if not self._moved:
            self.after = RandomStates(self.devices)
            self._moved = not self.after.same_as(self.before)

    def finish(self, *, keep: bool = True) -> None:
        """Leave the streams as the first evaluation that drew from them did, or as they were found."""
        if self.after is not None:
            (self.after if keep else self.before).restore()


class RepeatedEvaluation:
    """Random streams and buffers of a closure that is evaluated several times; see the module."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._random, self._buffers = RandomStreams(params), RunningBuffers()
        self.watched, self.places = self._buffers.watched, self._buffers.places

    @contextlib.contextmanager
    def evaluation(self, *, moves: bool = True) -> Iterator[None]:
        """Evaluate once, gradients enabled; `moves=False` for what never moves buffers."""
        with self._random.replayed(), self._buffers.evaluation(moves=moves), torch.enable_grad():
            yield

    def call(self, closure: Callable[[], Any], *, moves: bool = True) -> Any:
        """Return what the closure returns."""
        with self.evaluation(moves=moves):
            return closure()

    def finish(self, *, keep: bool = True) -> None:
        """Leave the trace of one evaluation, or none."""
        self._random.finish(keep=keep)
        if not keep:
            self._buffers.restore()


class Attempts:
    """Evaluations of one closure, step after step, that leave no trace where they are broken off.

    The first is watched as above. Later ones, of which few are broken off, keep torch's random states and copies of the
    buffers that the first found, which takes a hundredth of the time.
    """

    def __init__(self) -> None:
        self._places: list[tuple[_Store, str]] | None = None

    @contextlib.contextmanager
    def attempt(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Evaluate once."""
        if self._places is None:
            repeated = RepeatedEvaluation(params)
            with repeated.watched(), repeated.evaluation():
                yield
            self._places = repeated.places()
            return
        states = [(g, g.get_state()) for g in default_generators({p.device for p in params})]
        buffers = [(store, name, store.get(name)) for store, name in self._places]
        kept = [(*place, None if place[2] is None else place[2].detach().clone()) for place in buffers]
        try:
            yield
        except BaseException:
            for generator, state in states:
                generator.set_state(state)
            for store, name, buffer, content in kept:
                store[name] = buffer
                if buffer is not None and content is not None and not buffer.is_inference():
                    with torch.no_grad():
                        buffer.copy_(content)
            raise
