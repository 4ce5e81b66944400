"""Tensors on disk, written and read by all ranks at once through `torch.distributed.checkpoint`.

Sharded tensors are written by parameter, (rows, *shape), each rank its own part: other numbers of ranks can read them.
All else is alike on every rank and written once.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["read", "write"]

_MARK = "\0tensor"
_SMALL = 1 << 20  # bytes, up to which tensors are written beside plain numbers


def write(tree: Any, folder: str | os.PathLike[str], group: ProcessGroup | None) -> None:
    """Write tensors and plain values in lists, tuples and dictionaries into a new folder. All ranks do so together.

    It holds a file `.metadata` as soon as it is complete.

    Raises:
        InputError: if it cannot be written.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Any] = {}
    rest = io.BytesIO()
    torch.save(_noted(tree, tensors), rest)
    whole = {**tensors, "rest": rest.getvalue()}
    _tried("written", folder, lambda: save(whole, checkpoint_id=folder, **_ranks(group)))


def read(
    folder: str | os.PathLike[str], layout: Layout | None, device: torch.device, group: ProcessGroup | None
) -> Any:
    """Return what was written, tensors with the same strides, sharded ones as the ranks hold vectors now.

    Args:
        folder: that `write` filled.
        layout: of vectors; None where they are whole, as sharded ones then are, too.
        device: of tensors that were not on the CPU.
        group: all ranks.

    Raises:
        InputError: if it cannot be read, or does not suit the ranks.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    def loaded(state: dict[str, Any]) -> dict[str, Any]:
        _tried("read", folder, lambda: load(state, storage_reader=FileSystemReader(folder), **_ranks(group)))
        return state

    rest = loaded({"rest": b""})["rest"]
    tree = torch.load(io.BytesIO(rest), weights_only=True, map_location="cpu")
    notes: list[_Place] = []
    _replaced(tree, lambda note: notes.append(_Place(note, layout, device, folder)))
    parts = {name: part for place in notes for name, part in place.parts.items()}
    if parts:
        loaded(parts)
    found = iter(notes)
    return _replaced(tree, lambda _: next(found).tensor())


def _noted(tree: Any, tensors: dict[str, Any]) -> Any:
    """Return a tree with notes in place of tensors, and put what is to be written of large ones into `tensors`."""
    if isinstance(tree, dict):
        return {key: _noted(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_noted(value, tensors) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    name, x = str(len(tensors)), tree.detach()
    held = x.local if isinstance(x, ShardedTensor) else x
    order = sorted(range(x.ndim), key=lambda d: (-held.stride()[d], d))  # as it lies in memory
    note: dict[str, Any] = {_MARK: name, "cpu": x.device.type == "cpu", "dtype": x.dtype, "order": order}
    if isinstance(x, ShardedTensor):
        rows = held.movedim(x.along, -1)
        note |= {"along": x.along, "rows": tuple(rows.shape[:-1]), "tensors": x.sharding.positions}
        note["shapes"] = x.sharding.shapes
        flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
        tensors |= {f"{name}.{i}": piece for i, piece in enumerate(_pieces(flat, x.sharding))}
    elif x.nbytes <= _SMALL:
        note["value"] = x.permute(order).contiguous().cpu().clone()
    else:
        note["shape"] = [x.shape[d] for d in order]
        tensors[name] = x.permute(order).contiguous()
    return note


def _replaced(tree: Any, by: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a tree with what `by` makes of each note in its place."""
    if isinstance(tree, dict):
        return by(tree) if _MARK in tree else {key: _replaced(value, by) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replaced(value, by) for value in tree)
    return tree


class _Place:
    """Where a tensor is read to: `parts` are tensors by the names that they have on disk."""

    def __init__(
        self, note: dict[str, Any], layout: Layout | None, device: torch.device, folder: str | os.PathLike[str]
    ) -> None:
        self.note, self.device = note, torch.device("cpu") if note["cpu"] else device
        self.layout: Layout | None = None
        self.parts: dict[str, Tensor] = {}
        name = note[_MARK]
        if "shapes" not in note:
            if "shape" in note:
                self.parts = {name: torch.empty(note["shape"], dtype=note["dtype"], device=self.device)}
            return
        count, shapes = math.prod(note["rows"]), [tuple(shape) for shape in note["shapes"]]
        if layout is None:
            pieces = [torch.empty(count, *shape, dtype=note["dtype"], device=self.device) for shape in shapes]
        else:
            root = layout.root or layout
            self.layout = root.of(note["tensors"]) if max(note["tensors"], default=0) < len(root.shapes) else None
            if self.layout is None or list(self.layout.shapes) != shapes:
                raise InputError(f"the run in {os.fspath(folder)!r} is one of other parameters.")
            self._rows = torch.empty(count, self.layout.num_local, dtype=note["dtype"], device=self.device)
            pieces = _pieces(self._rows, self.layout)
        self.parts = {f"{name}.{i}": piece for i, piece in enumerate(pieces)}

    def tensor(self) -> Tensor:
        """Return what was read."""
        note, order = self.note, self.note["order"]
        if "shapes" not in note:
            value = note["value"].to(self.device) if "value" in note else self.parts[note[_MARK]]
            return value.permute([order.index(d) for d in range(len(order))])
        if self.layout is None:
            rows = torch.cat([part.reshape(len(part), -1) for part in self.parts.values()], dim=1)
        else:
            rows = self._rows
        local = rows.view(*note["rows"], rows.shape[-1]).movedim(-1, note["along"])
        if [local.stride(d) for d in order] != sorted(local.stride(), reverse=True):
            local = torch.empty_permuted(local.shape, order, dtype=local.dtype, device=local.device).copy_(local)
        return local if self.layout is None else ShardedTensor(local, self.layout, note["along"])


def _ranks(group: ProcessGroup | None) -> dict[str, Any]:
    return {"no_dist": True} if group is None else {"process_group": group}


def _tried(what: str, folder: str | os.PathLike[str], act: Callable[[], Any]) -> Any:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # that a single process is one
            warnings.filterwarnings("ignore", "torch.distributed is disabled|torch.distributed is unavailable")
            return act()
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[-1][:200]
        raise InputError(f"the run in {os.fspath(folder)!r} cannot be {what}: {said}") from error


def _pieces(rows: Tensor, layout: Layout) -> list[Tensor]:
    """Return this rank's parts of (rows, *shape) for each parameter, as views."""
    starts = layout.local_starts[layout.rank]
    found: list[Tensor] = []
    for i, (shape, box) in enumerate(zip(layout.shapes, layout.boxes[layout.rank], strict=True)):
        view = rows[:, starts[i] : starts[i + 1]].unflatten(1, [b - a for a, b in box] or [1])
        found.append(_Piece.of(view if shape else view[:, 0], shape, box, layout.owns(layout.rank, i)))
    return found


class _Piece(Tensor):
    """A part of a larger tensor, as `torch.distributed.checkpoint` asks for it."""

    _whole: torch.Size
    _offsets: torch.Size
    _is_mine: bool

    @classmethod
    def of(cls, part: Tensor, shape: tuple[int, ...], box: Any, is_mine: bool) -> _Piece:
        """Return the part of rows of tensors of this shape that lies in a box; only its owner writes it."""
        made = part.as_subclass(cls)
        made._whole = torch.Size((len(part), *shape))
        made._offsets = torch.Size((0, *(a for a, _ in box)))
        made._is_mine = is_mine
        return made

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the larger tensor."""
        return self._whole if dim is None else self._whole[dim]

    def _plain(self) -> Tensor:
        return self.as_subclass(Tensor)

    def _chunk(self) -> Any:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=self._offsets, sizes=self._plain().size())

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        part = self._plain()
        if not self._is_mine or part.numel() == 0:
            return []
        properties = TensorProperties.create_from_tensor(part)
        data = TensorWriteData(chunk=self._chunk(), properties=properties, size=self._whole)
        index = MetadataIndex(fqn, self._offsets)
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[Any]:
        return [self._chunk()] if self._plain().numel() else []

    def __get_tensor_shard__(self, _: object) -> Tensor:
        return self._plain()
