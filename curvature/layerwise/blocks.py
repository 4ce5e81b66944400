"""Diagonal blocks of a curvature matrix, entry by entry, from the columns that its diagonal takes.

    H_BB = sum_b w_b sum_n sum_v s_v (J_nB' r_vn) (J_nB' r_vn)' / sum_b w_b

with columns r_v and signs s_v as in `curvature.layerwise.diagonal`, whose squares are the diagonals of these outer
products. A product with a unit vector for each parameter, through the whole model, gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.layerwise.bends import meeting_in_products
from curvature.objective.objective import Objective
from curvature.parameters import Block
from curvature.per_example.batch import CHUNK_BYTES, PartOfParameters
from curvature.per_example.run import Run

__all__ = ["DiagonalBlocks", "pays"]

_MOST = 2**13  # parameters of a block times columns: beyond it, outer products cost as much as what they spare


def pays(block: Block, num_columns: int) -> bool:
    """Say whether a block is small enough to be filled from so many columns."""
    return block.num_params * num_columns <= _MOST


class DiagonalBlocks:
    """The blocks that an exact diagonal fills as it goes, batch by batch.

    A block is left out where two factors of one product depend on it, which gives its Hessian entries that no column
    has, and where it is so large for so many columns that products with it are cheaper.

    Attributes:
        objective: what the matrix is of.
        batches: place of a batch that counts -> its weight, and the blocks of its own matrix, (m, m), by the names of
            their parameters.

    Args:
        objective: on one rank.
        blocks: of its parameters.
    """

    def __init__(self, objective: Objective, blocks: Sequence[Block]) -> None:
        self.objective, self._wanted = objective, list(blocks)
        self._now: list[tuple[Block, Tensor]] = []
        self.batches: dict[int, tuple[float, dict[tuple[str, ...], Tensor]]] = {}

    @property
    def blocks(self) -> list[Block]:
        """Those that were filled."""
        return self._wanted if self.batches else []

    def total(self, block: Block) -> Tensor:
        """Return the block of the objective's matrix, (m, m)."""
        weights, parts = zip(
            *((weight, found[block.parameters]) for weight, found in self.batches.values()), strict=True
        )
        total = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)
        return total if self.objective.is_sum else total / sum(weights)

    def begin(self, run: Run, weight: float, num_columns: int, *, curved: bool) -> None:
        """Make room for a batch, whose columns come next; `curved` says that they are those of the Hessian."""
        self._wanted = [block for block in self._wanted if pays(block, num_columns)]
        outputs = run.evaluation.outputs
        if curved and isinstance(outputs, Tensor):
            params = list(self.objective.space.tensors.values())
            met = meeting_in_products(outputs, [[params[i] for i in block.positions] for block in self._wanted])
            self._wanted = [block for i, block in enumerate(self._wanted) if i not in met]
        like = self.objective.space.current()
        self._now = [(block, like.new_zeros(block.num_params, block.num_params)) for block in self._wanted]
        self.batches[run.index] = weight, {block.parameters: total for block, total in self._now}

    def add(self, forms: Sequence[PartOfParameters], sign: float | Tensor) -> None:
        """Add a column's gradients of single examples, with one sign or (N,) of them."""
        numels = self.objective.space.numels
        of_parameter = {positions[0]: form for positions, form in forms if len(positions) == 1}
        for block, total in self._now:
            known = [of_parameter[i] for i in block.positions if i in of_parameter]
            if not known:
                continue
            for start, stop in min((list(form.chunks(CHUNK_BYTES)) for form in known), key=lambda c: c[0][1]):
                parts = [
                    of_parameter[i].dense(start, stop)
                    if i in of_parameter
                    else total.new_zeros(stop - start, numels[i])
                    for i in block.positions
                ]
                rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                signed = rows * (sign if isinstance(sign, float) else sign[start:stop, None])
                total.addmm_(signed.T, rows)
