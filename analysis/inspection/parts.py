"""Which parts of a model are inspected one by one: its layers, or where they are many, the modules that hold them."""

from __future__ import annotations

from dataclasses import replace

from curvature.objective.objective import Objective
from curvature.parameters import Block

__all__ = ["parts_of"]


def parts_of(objective: Objective, most: int) -> tuple[Block, ...]:
    """Return one block for each module that owns parameters, or, where these are more than `most`, for larger modules.

    Then all names are cut to the same number of components, the largest with which there are no more than `most` parts
    (and two at least): of a transformer, its blocks. Where no cut does that, the layers are left as they are.
    """
    space = objective.space
    layers = space.blocks
    if len(layers) <= most:
        return layers
    for depth in range(max(layer.name.count(".") for layer in layers), 0, -1):
        members: dict[str, list[str]] = {}
        for layer in layers:
            members.setdefault(".".join(layer.name.split(".")[:depth]), []).extend(layer.parameters)
        if 2 <= len(members) <= most:
            return tuple(
                replace(space.block({each: space.tensors[each] for each in names}), name=name)
                for name, names in members.items()
            )
    return layers
