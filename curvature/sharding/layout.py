"""Who holds what of a flat vector: each rank a box of every tensor that the vector is made of.

A whole vector (n,) is the entries of the first tensor in row-major order, then those of the second, and so on. A rank's
part is the entries of its boxes in that order. Several ranks may hold the same box; the first of them owns it, and only
owners count in sums over entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.errors import InputError
from curvature.sharding.collectives import PIECE, all_gather, all_reduce, arrive, explained, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Box", "Layout", "box_of"]

Box: TypeAlias = tuple[tuple[int, int], ...]
"""First and last place but one, in each dimension of a tensor."""

_BUCKET = 1 << 22  # entries that a collective moves at a time: enough to be fast, little beside what is moved


def box_of(tensor: Tensor) -> Box:
    """Return the part of a DTensor that this rank holds; of another tensor, all of it.

    Raises:
        InputError: for placements that are neither shards nor replicas.
    """
    start, size = [0] * tensor.ndim, list(tensor.shape)
    placements = list(enumerate(getattr(tensor, "placements", ())))
    strided = [(m, p) for m, p in placements if type(p).__name__ == "_StridedShard"]  # split after all others were
    if len({p.dim for _, p in strided}) < len(strided) or any(p.is_partial() for _, p in placements):
        raise InputError(f"parameters must be sharded or replicated, got placements {tensor.placements}.")  # type: ignore[attr-defined] # of a DTensor
    for m, placement in [pair for pair in placements if pair not in strided] + strided:
        if placement.is_replicate():
            continue
        mesh = tensor.device_mesh  # type: ignore[attr-defined] # of a DTensor
        dim, chunk = placement.dim % tensor.ndim, -(-size[placement.dim] // mesh.size(m))
        first = min(chunk * mesh.get_coordinate()[m], size[dim])
        start[dim], size[dim] = start[dim] + first, min(chunk, size[dim] - first)
    if hasattr(tensor, "to_local") and tuple(tensor.to_local().shape) != tuple(size):
        raise InputError(
            f"a parameter of shape {tuple(tensor.shape)} with placements {tensor.placements} is not split as torch "  # type: ignore[attr-defined] # of a DTensor
            "splits it: shard it by fully_shard or distribute_tensor."
        )
    return tuple((a, a + s) for a, s in zip(start, size, strict=True))


def _numel(box: Box) -> int:
    return math.prod(b - a for a, b in box)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a flat vector lies over a group of ranks.

    Attributes:
        group: the ranks.
        shapes: of the tensors that the vector is made of.
        boxes: what each rank holds of each tensor, by rank.
        root: the layout that this is a part of; itself if it is none.
        positions: the tensors of the root that are in it.
    """

    group: ProcessGroup
    shapes: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[Box, ...], ...]
    root: Layout | None = None
    positions: tuple[int, ...] = ()

    @classmethod
    def agreed(cls, tensors: Sequence[Tensor], group: ProcessGroup) -> Layout:
        """Return the layout of DTensors, and others, that all ranks of the group hold; every rank tells what it has.

        Raises:
            InputError: if the parts of some tensor do not make it up.
        """
        every: list[Any] = [None] * group.size()
        with explained():
            dist.all_gather_object(every, tuple(map(box_of, tensors)), group=group)
        shapes = tuple(tuple(t.shape) for t in tensors)
        layout = cls(group, shapes, tuple(every), positions=tuple(range(len(shapes))))
        for i, shape in enumerate(shapes):
            held = sum(_numel(boxes[i]) for r, boxes in enumerate(layout.boxes) if layout.owns(r, i))
            if held != math.prod(shape):
                raise InputError(f"the ranks hold {held} entries of a parameter of shape {shape}: shard it anew.")
        return layout

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a sharded tensor cannot be copied or pickled: save x.whole(), or x.local on each rank.")

    # -- facts --------------------------------------------------------------------------------------------------------

    def owns(self, rank: int, i: int) -> bool:
        """Whether a rank is the first that holds its box of tensor i."""
        return all(self.boxes[r][i] != self.boxes[rank][i] for r in range(rank))

    @cached_property
    def rank(self) -> int:
        return self.group.rank()

    @cached_property
    def num_entries(self) -> int:
        """Of the whole vector."""
        return sum(map(math.prod, self.shapes))

    @cached_property
    def starts(self) -> list[int]:
        """Where the tensors begin in the whole vector; the end of the last one, too."""
        return _sums(map(math.prod, self.shapes))

    @cached_property
    def local_starts(self) -> list[list[int]]:
        """Where the boxes begin in the part of each rank; the end of the last one, too."""
        return [_sums(map(_numel, boxes)) for boxes in self.boxes]

    @property
    def most_held(self) -> int:
        """Entries that the rank with the largest part holds: what all ranks reckon memory by."""
        return max(starts[-1] for starts in self.local_starts)

    @property
    def num_local(self) -> int:
        """Entries of this rank's part."""
        return self.local_starts[self.rank][-1]

    @cached_property
    def held_once(self) -> bool:
        """Whether no two ranks hold the same entries."""
        return sum(starts[-1] for starts in self.local_starts) == self.num_entries

    @cached_property
    def owned(self) -> Tensor | None:
        """Which entries of this rank's part it owns, (num_local,); None if all."""
        flags = [self.owns(self.rank, i) or _numel(box) == 0 for i, box in enumerate(self.boxes[self.rank])]
        if all(flags):
            return None
        return torch.cat([torch.full((_numel(box),), f) for f, box in zip(flags, self.boxes[self.rank], strict=True)])

    def sub(self, first: int, stop: int) -> Layout:
        """Return the layout of the entries from `first` to `stop`, which are those of some tensors.

        Raises:
            InputError: if they cut a tensor.
        """
        starts = self.starts
        if first not in starts or stop not in starts:
            raise InputError(
                f"entries {first} to {stop} of a sharded vector cut a parameter, and ranks hold parts of it: take "
                "whole parameters, or x.whole() first."
            )
        return self.of(range(starts.index(first), len(starts) - 1 - starts[::-1].index(stop)))

    def of(self, tensors: Sequence[int]) -> Layout:
        """Return the layout of some of the tensors, in ascending order; the same one for the same tensors."""
        root = self.root or self
        return root._of(tuple(self.positions[i] for i in tensors))

    @cached_property
    def _known(self) -> dict[tuple[int, ...], Layout]:
        return {self.positions: self}

    def _of(self, positions: tuple[int, ...]) -> Layout:
        if positions not in self._known:
            boxes = tuple(tuple(held[i] for i in positions) for held in self.boxes)
            shapes = tuple(self.shapes[i] for i in positions)
            self._known[positions] = Layout(self.group, shapes, boxes, self, positions)
        return self._known[positions]

    def joined(self, others: Sequence[Layout]) -> Layout:
        """Return the layout of this vector with others behind it.

        Raises:
            InputError: if they are not parts of one vector, in its order.
        """
        positions = [*self.positions, *(i for other in others for i in other.positions)]
        root = self.root or self
        if any((other.root or other) is not root for other in others) or positions != sorted(set(positions)):
            raise InputError("sharded vectors can be joined where they are parts of one vector, in its order.")
        return root._of(tuple(positions))

    # -- parts and wholes ---------------------------------------------------------------------------------------------

    def part(self, whole: Tensor, dim: int = -1) -> Tensor:
        """Return this rank's part of a tensor whose dimension `dim` runs over the whole vector, as a copy."""
        rows = whole.movedim(dim, -1)
        pieces = []
        for i, box in enumerate(self.boxes[self.rank]):
            tensor = rows[..., self.starts[i] : self.starts[i + 1]].unflatten(-1, self.shapes[i] or (1,))
            pieces.append(tensor[(..., *_slices(box))].reshape(*rows.shape[:-1], _numel(box)))
        return torch.cat(pieces, dim=-1).movedim(-1, dim)

    def whole(self, rows: Tensor) -> Tensor:
        """Return whole vectors (k, n), alike on every rank, of parts (k, num_local). A gather for each bucket."""
        k = len(rows)
        found = rows.new_empty(k, self.num_entries)
        on_their_way: list[tuple[Any, Tensor]] = []
        for first, stop in self._buckets(rows):
            most = max(starts[stop] - starts[first] for starts in self.local_starts)
            mine = rows[:, self.local_starts[self.rank][first] : self.local_starts[self.rank][stop]]
            if k == 1 and self._in_turn(first, stop):
                place = found[0, self.starts[first] : self.starts[stop]].view(self.group.size(), -1)
                all_gather(mine[0], self.group, out=place, later=on_their_way)
                continue
            sent = mine if mine.shape[1] == most else torch.nn.functional.pad(mine, (0, most - mine.shape[1]))
            received = all_gather(sent, self.group)
            for rank, i, place in self._places(first, stop, found):
                a, b = (self.local_starts[rank][j] - self.local_starts[rank][first] for j in (i, i + 1))
                place.copy_(received[rank, :, a:b].view(place.shape))
        arrive(on_their_way)
        return found

    def summed(self, rows: Tensor, ranks: ProcessGroup | None, factor: float = 1.0) -> Tensor:
        """Return this rank's part (k, num_local) of the sum of factor * rows (k, n) over the ranks that add up.

        One reduce-scatter for each bucket where these are all ranks; else their sums, of which the part is taken.
        """
        if ranks is None:
            return self.part(rows) * factor
        if set(dist.get_process_group_ranks(ranks)) != set(dist.get_process_group_ranks(self.group)):
            return self.part(all_reduce(rows * factor, ranks))
        k = len(rows)
        found = rows.new_empty(k, self.num_local)
        for first, stop in self._buckets(rows):
            a, b = (self.local_starts[self.rank][j] for j in (first, stop))
            if k == 1 and self._in_turn(first, stop):
                by_rank = rows[0, self.starts[first] : self.starts[stop]].view(self.group.size(), 1, -1)
                reduce_scatter(by_rank, self.group, factor, out=found[:, a:b])
                continue
            most = max(starts[stop] - starts[first] for starts in self.local_starts)
            sent = rows.new_empty(self.group.size(), k, most)  # what is left of it after a part nobody reads
            for rank, i, place in self._places(first, stop, rows, owners=False):
                c, d = (self.local_starts[rank][j] - self.local_starts[rank][first] for j in (i, i + 1))
                sent[rank, :, c:d].view(place.shape).copy_(place)
            found[:, a:b] = reduce_scatter(sent, self.group, factor)[:, : b - a]
        return found

    def _in_turn(self, first: int, stop: int) -> bool:
        """Whether the ranks hold a bucket of one tensor one after the other, as many entries each."""
        shape, count = self.shapes[first], self.group.size()
        if stop - first > 1 or not shape or shape[0] == 0 or shape[0] % count:
            return False
        step, rest = shape[0] // count, tuple((0, n) for n in shape[1:])
        return all(self.boxes[r][first] == ((r * step, (r + 1) * step), *rest) for r in range(count))

    def _buckets(self, rows: Tensor) -> list[tuple[int, int]]:
        """Return runs of tensors that are moved at a time, of whole or local rows: short ones where pieces are."""
        buckets, first, k = [], 0, len(rows)
        most = PIECE if rows.device.type == "cpu" else _BUCKET
        for i in range(1, len(self.shapes) + 1):
            if i == len(self.shapes) or k * (self.starts[i + 1] - self.starts[first]) > most:
                buckets.append((first, i))
                first = i
        return buckets

    def _places(self, first: int, stop: int, rows: Tensor, *, owners: bool = True) -> Any:
        """Yield (rank, tensor, view of its box in whole rows) of what every rank holds, or owns."""
        for i in range(first, stop):
            shape = self.shapes[i] or (1,)
            whole = rows[:, self.starts[i] : self.starts[i + 1]].view(len(rows), *shape)
            for rank in range(self.group.size()):
                box = self.boxes[rank][i] or ((0, 1),)
                if _numel(box) and (not owners or self.owns(rank, i)):
                    yield rank, i, whole[(slice(None), *_slices(box))]

    def drawn(self, draw: Callable[[int], Tensor], k: int, dtype: torch.dtype) -> Tensor:
        """Return this rank's part (k, num_local) of k whole vectors whose entries `draw(count)` yields one by one.

        On CPUs the numbers are those that one process draws at once: chunks are multiples of 16 long, and the last one
        is no shorter, which is how torch fills them. No more than a chunk is held beside the part.
        """
        if k == 0:
            return draw(0).to(dtype).new_empty(0, self.num_local)
        total, taken = k * self.num_entries, 0
        found: list[list[Tensor]] = [[] for _ in range(k)]
        while taken < total:
            count = min(_BUCKET, total - taken)
            if 0 < total - taken - count < 16:
                count = total - taken
            chunk = draw(count).to(dtype)
            first = taken
            taken += count
            for row in range(first // self.num_entries, -(-taken // self.num_entries)):
                a, b = max(0, first - row * self.num_entries), min(self.num_entries, taken - row * self.num_entries)
                places = self._within(a, b, chunk.device)
                found[row].append(chunk[places + (row * self.num_entries - first)])
        return torch.stack([torch.cat(parts) for parts in found])

    def _within(self, a: int, b: int, device: torch.device) -> Tensor:
        """Return the places in the whole vector of this rank's entries between a and b, ascending."""
        parts = []
        for start, shape, box in zip(self.starts[:-1], self.shapes, self.boxes[self.rank], strict=True):
            stop = start + math.prod(shape)
            if stop <= a or start >= b or not _numel(box):
                continue
            places = torch.full((), start, device=device)
            for d, (low, high) in enumerate(box):
                places = places[..., None] + torch.arange(low, high, device=device) * math.prod(shape[d + 1 :])
            flat = places.flatten()
            parts.append(flat[(flat >= a) & (flat < b)] if start < a or stop > b else flat)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _sums(counts: Any) -> list[int]:
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums
