"""Tensors that stand in a model in place of its own while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["StandIns", "here"]


class StandIns:
    """Tensors that stand in for a model's own while they are installed, and belong to one graph.

    Args:
        stores: where modules hold tensors by name.
        make: returns what stands in for a tensor; called once for each.
    """

    def __init__(self, stores: Iterable[dict[str, Any]], make: Callable[[Tensor], Tensor]) -> None:
        made: dict[int, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        for store in stores:
            for name, own in store.items():
                if own is not None:
                    if id(own) not in made:
                        made[id(own)] = make(own)
                    self._places.append((store, name, made[id(own)]))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        originals = [(store, name, store[name]) for store, name, _ in self._places]
        try:
            for store, name, stand_in in self._places:
                store[name] = stand_in
            yield
        finally:
            for store, name, original in originals:
                store[name] = original


def here(buffer: Tensor) -> Tensor:
    """Return a buffer as an ordinary tensor, also where it is one that ranks hold replicas of."""
    local: Tensor = getattr(buffer, "to_local", buffer.detach)()
    return local
