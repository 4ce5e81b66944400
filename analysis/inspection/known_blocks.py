"""Products with the Hessian whose small diagonal blocks are known entry by entry, from the columns of its diagonal.

A product with the block of a layer goes through all layers behind it, however few parameters the layer has: a matrix of
a normalisation's 64 entries costs as much a product as the whole network's. The columns that the diagonal takes anyway
hold the entries of such blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from analysis.inspection.diagonal import exactly
from curvature.layerwise import ExactDiagonal
from curvature.layerwise.blocks import DiagonalBlocks
from curvature.operators.hessian import HessianOperator
from curvature.parameters import Block

__all__ = ["KnownBlocks", "with_known_blocks"]


def with_known_blocks(
    H: HessianOperator, blocks: Sequence[Block]
) -> tuple[HessianOperator, ExactDiagonal | str, tuple[str, ...]]:
    """Return H with those blocks known that the columns of its diagonal give, what these make of the diagonal, notes.

    Cost: that of the exact diagonal, and a product with each block.
    """
    objective = H.objective
    alone = objective.ranks is None and objective.shards is None
    found = DiagonalBlocks(objective, blocks) if alone else None
    exact = exactly(objective, found)
    if found is None or isinstance(exact, str) or not found.blocks:
        return H, exact, ()
    known = KnownBlocks(H, found)
    note = (
        f"Products with the blocks of {', '.join(known.served)} are made from their entries, which the columns of the "
        f"diagonal hold: Hessian products agree to {max(known.served.values(), default=0):.1e}."
    )
    return known, exact, (note,) if known.served else ()


_Observer = Callable[[int, float, list[Tensor]], None]


class KnownBlocks(HessianOperator):
    """A Hessian that multiplies with blocks that were filled from them, and with all else as before.

    Before a block serves, one product with a random vector is compared with the Hessian's own.

    Args:
        H: the Hessian of an objective.
        found: blocks of its batches.

    Attributes:
        served: the blocks that are multiplied with, and the relative differences that the comparisons found.
    """

    def __init__(self, H: HessianOperator, found: DiagonalBlocks) -> None:
        super().__init__(H.objective)
        self._H, self._batches = H, found.batches
        self._point = H.objective.freshness.point()
        self.served: dict[str, float] = {}
        self._known: dict[tuple[str, ...], Tensor] = {}
        blocks = found.blocks
        generator = torch.Generator().manual_seed(0)
        probes = [torch.randn(b.num_params, 1, generator=generator).to(H.device, H.dtype) for b in blocks]
        bound = 10 * max(torch.finfo(p.dtype).eps for p in H.objective.space.tensors.values()) ** 0.5
        for block, z, product in zip(blocks, probes, H.products(probes, blocks) if blocks else [], strict=True):
            matrix = found.total(block)
            difference, size = float((matrix @ z - product).norm()), float(product.norm())
            if difference <= bound * size:
                self._known[block.parameters] = matrix
                self.served[block.name] = difference / size if size else 0.0

    def products(
        self, X: Sequence[Tensor], blocks: Sequence[Block | None], *, observe: _Observer | None = None
    ) -> list[Tensor]:
        if self.objective is not self._H.objective:
            return super().products(X, blocks, observe=observe)
        if self.objective.freshness.point() is not self._point:  # which raises where it moved within a run
            self._known = {}
        known = [None if block is None else self._known.get(block.parameters) for block in blocks]
        others = [i for i, matrix in enumerate(known) if matrix is None]

        def all_parts(index: int, weight: float, parts: list[Tensor]) -> None:
            rest, assemble = iter(parts), zip(X, blocks, known, strict=True)
            of_batch = self._batches[index][1] if len(parts) < len(X) else {}
            assert observe is not None
            whole = [next(rest) if b is None or M is None else of_batch[b.parameters] @ x for x, b, M in assemble]
            observe(index, weight, whole)

        told = None if observe is None else all_parts
        if others:
            rest = iter(self._H.products([X[i] for i in others], [blocks[i] for i in others], observe=told))
        else:
            rest = iter(())
            for index, (weight, _) in self._batches.items() if told is not None else ():
                all_parts(index, weight, [])
        return [next(rest) if matrix is None else matrix @ x for matrix, x in zip(known, X, strict=True)]
