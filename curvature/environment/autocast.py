"""Autocast: the model runs as the user has it, everything else in the dtypes that it has.

torch keeps cast weights by the address of the parameter for as long as the outermost context lasts, whatever happens to
the parameter meanwhile, so a model is run without that cache.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

__all__ = ["as_around", "full_precision", "present", "suspended", "without"]

P = ParamSpec("P")
R = TypeVar("R")

_around: ContextVar[tuple[str, ...]] = ContextVar("around", default=())


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's own arithmetic run without autocast; models that it evaluates run as around its call."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with suspended():
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Switch autocast off, for arithmetic of our own; inside, `as_around` gives it back to models."""
    devices = _enabled()
    token = _around.set((*_around.get(), *devices))
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)
        _around.reset(token)


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Have models, too, run without autocast."""
    with suspended():
        token = _around.set(())
        try:
            yield
        finally:
            _around.reset(token)


@contextlib.contextmanager
def as_around() -> Iterator[None]:
    """Have autocast as it is around the outermost of our functions, without the cache of cast weights."""
    devices = [device for device in _around.get() if not torch.is_autocast_enabled(device)]
    cached = torch.is_autocast_cache_enabled()
    for device in devices:
        torch.set_autocast_enabled(device, True)
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()  # also where autocast is off: contexts inside a disabled one fill the same cache
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)
        for device in devices:
            torch.set_autocast_enabled(device, False)


def present() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the devices for which models run under autocast now, and in what."""
    around, enabled = _around.get(), _enabled()
    if not around and not enabled:
        return ()
    devices = sorted({*around, *enabled})
    return tuple((device, torch.get_autocast_dtype(device)) for device in devices)


def _enabled() -> tuple[str, ...]:
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(device for device in torch._C._autocast_supported_devices() if torch.is_autocast_enabled(device))
