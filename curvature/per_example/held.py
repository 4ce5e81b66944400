"""What a pass leaves behind for sums that need its end, such as g_i'g."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvature.data.tensors import tensors_in
from curvature.per_example.fallback import OneByOne
from curvature.per_example.forms import Form, Rows, Windows
from curvature.per_example.walk import Group

__all__ = ["Held"]


class Held:
    """Groups whose parts are held until a pass is over, while they fit.

    Args:
        budget: bytes that may be held.
    """

    def __init__(self, budget: int) -> None:
        self._rest = budget
        self.groups: list[Group] | None = [] if budget > 0 else None
        """None once they do not fit, or where examples would be computed anew, one by one."""

    def add(self, group: Group, batch: Any) -> None:
        """Hold a group of this batch, whose tensors a loader may fill with the next."""
        if self.groups is None:
            return
        data = {t.untyped_storage().data_ptr() for t in tensors_in(batch) if t.layout is torch.strided}
        for owner, name, t in [found for part in group.parts for found in _tensors(part.form)]:
            self._rest -= t.nbytes
            if t.untyped_storage().data_ptr() in data:
                setattr(owner, name, t.clone())
        self.groups.append(replace(group, gradient=group.gradient.new_empty(0)))
        if self._rest < 0 or any(isinstance(part.form, OneByOne) for part in group.parts):
            self.groups = None


def _tensors(owner: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield the tensors that a form or a part of one is made of, each with its owner and its name there."""
    for name, value in vars(owner).items():
        if isinstance(value, Tensor):
            yield owner, name, value
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, (Form, Rows, Windows)):
                yield from _tensors(part)
