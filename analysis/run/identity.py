"""What a measurement was made of: digests of a loss and of data, by which a run that goes on knows them again."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from analysis.run.preparation import data_sha256, fingerprint

__all__ = ["batches_sha256", "loss_sha256"]

_DEEPEST = 6


def loss_sha256(loss: Callable[..., Any] | None) -> str:
    """Return a digest of what a loss computes: class and settings of a module, code and closure of a function.

    Functions that it calls by a global name are known by their names alone.
    """
    return hashlib.sha256(repr(_described(loss, 0)).encode()).hexdigest()


def _described(value: Any, depth: int) -> Any:
    """Return nested plain values that are the same in another process."""
    if depth > _DEEPEST or value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value) if depth <= _DEEPEST else ""
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, (tuple, list)):
        return [_described(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_described(item, depth + 1)) for item in value)
    if isinstance(value, dict):
        return sorted((str(key), str(_described(item, depth + 1))) for key, item in value.items())
    if isinstance(value, functools.partial):
        return ["partial", *(_described(part, depth + 1) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, _described(value.co_consts, depth + 1)]
    if isinstance(value, FunctionType):
        cells = [_described(cell, depth + 1) for cell in _contents(value)]
        return [_described(value.__code__, depth + 1), _described(value.__defaults__, depth + 1), cells]
    name = f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, nn.Module):
        own = {key: item for key, item in vars(value).items() if not key.startswith("_") and key != "training"}
        held = {key: getattr(value, key) for key in ("_parameters", "_buffers", "_modules")}
        return [name, _described(own, depth + 1), _described(held, depth + 1)]
    return [name, _described(getattr(value, "__dict__", None), depth + 1) if not isinstance(value, type) else ""]


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # of a name that is not bound yet
            yield None


def batches_sha256(data: Any) -> str | None:
    """Return a digest of data whatever the order of their examples; None for none, or what can be walked only once."""
    if data is not None and (found := data_sha256(data)) is not None:
        return found
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        return None
    return _of_examples(data)


def _of_examples(data: Iterable[Any]) -> str:
    """Return a digest of all examples of a loader, as a set with repetitions."""
    total = 0
    for batch in data:
        tensors = [
            part for part in (batch if isinstance(batch, (tuple, list)) else [batch]) if isinstance(part, Tensor)
        ]
        sizes = {len(t) for t in tensors if t.ndim > 0}
        rows = zip(*tensors, strict=True) if len(sizes) == 1 and all(t.ndim for t in tensors) else [tuple(tensors)]
        total += sum(int(fingerprint(*row), 16) for row in rows)
    return f"{total % 2**256:064x}"
