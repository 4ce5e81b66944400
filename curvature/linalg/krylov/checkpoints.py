"""Runs of a solver on disk, written and read by all ranks at once through `torch.distributed.checkpoint`.

The basis is written by parameter, (rows, *shape), each rank its own part: it can be read by other numbers of ranks. The
rest of the state is small and alike on every rank.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.krylov.thick_restart import ThickRestartLanczos
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor

__all__ = ["load_run", "save_run"]


def save_run(solver: ThickRestartLanczos, folder: str | os.PathLike[str]) -> None:
    """Write the state of a run into a folder. All ranks that hold parts of the matrix's vectors call it together.

    Args:
        solver: between two calls of `run`.
        folder: where; one that all ranks reach, without a run: what is cut off loses none that was saved before.

    Raises:
        InputError: if it cannot be written, or holds a run.

    Examples:
        >>> A = torch.diag(torch.arange(100.0))
        >>> solver = ThickRestartLanczos(A, 2, rtol=1e-4, generator=0)
        >>> status = solver.run(max_matvecs=10).status
        >>> save_run(solver, "run")  # doctest: +SKIP
        >>> later = ThickRestartLanczos(A, 2, rtol=1e-4, generator=0)
        >>> load_run(later, "run")  # doctest: +SKIP
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    if (Path(folder) / ".metadata").exists():  # written last, when all ranks are done
        raise InputError(f"{str(folder)!r} holds a run: save each time to a folder of its own.")
    state = solver.state_dict()
    rows = state.pop("rows")
    layout: Layout | None = getattr(rows, "sharding", None)
    parts = {"0": rows} if layout is None else _pieces(rows.local, layout)
    rest = io.BytesIO()
    torch.save(state, rest)
    whole = {"rows": parts, "rest": rest.getvalue()}
    _tried("written", folder, lambda: save(whole, checkpoint_id=folder, **_ranks(layout)))


def load_run(solver: ThickRestartLanczos, folder: str | os.PathLike[str]) -> None:
    """Go on from a run that `save_run` wrote, with a solver that was made with the same arguments.

    The number of ranks may be another one. A run that one process wrote is read whole by each rank, which takes the
    memory of the whole basis for a while.

    Raises:
        InputError: if there is no such run, or it is one of another problem.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    layout: Layout | None = getattr(solver.A, "sharding", None)
    reader = FileSystemReader(folder)
    found = _tried("read", folder, lambda: reader.read_metadata().state_dict_metadata)
    stored = {k.removeprefix("rows."): v for k, v in found.items() if k.startswith("rows.")}
    if not stored or "rest" not in found:
        raise InputError(f"{str(folder)!r} holds no run of a solver: write one by save_run.")
    sizes = {name: tuple(stored[name].size) for name in sorted(stored, key=int)}
    dtype = next(entry.properties.dtype for entry in stored.values())
    device = solver.space.rows.device
    local: Tensor | None = None
    if layout is not None and [s[1:] for s in sizes.values()] == list(layout.shapes):
        count = next(iter(sizes.values()))[0]
        local = torch.empty(count, layout.num_local, dtype=dtype, device=device)
        parts = _pieces(local, layout)
    else:
        parts = {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes.items()}
    whole: dict[str, Any] = {"rows": parts, "rest": b""}
    _tried("read", folder, lambda: load(whole, storage_reader=reader, **_ranks(layout)))
    state = torch.load(io.BytesIO(whole["rest"]), weights_only=True)
    if local is None:
        rows = torch.cat([part.reshape(len(part), -1) for part in parts.values()], dim=1)
        if layout is not None and rows.shape[1] == layout.num_entries:
            rows = ShardedTensor(layout.part(rows), layout)
    else:
        assert layout is not None
        rows = ShardedTensor(local, layout)
    solver.load_state_dict({**state, "rows": rows})


def _ranks(layout: Layout | None) -> dict[str, Any]:
    return {"no_dist": True} if layout is None else {"process_group": layout.group}


def _tried(what: str, folder: str | os.PathLike[str], act: Callable[[], Any]) -> Any:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # that a single process is one
            warnings.filterwarnings("ignore", "torch.distributed is disabled|torch.distributed is unavailable")
            return act()
    except (CheckpointException, OSError) as error:
        raise InputError(f"the run in {str(folder)!r} cannot be {what}: {str(error).splitlines()[-1][:200]}") from error


def _pieces(rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return this rank's parts of (rows, *shape) for each parameter, as views."""
    starts = layout.local_starts[layout.rank]
    found: dict[str, Tensor] = {}
    for i, (shape, box) in enumerate(zip(layout.shapes, layout.boxes[layout.rank], strict=True)):
        view = rows[:, starts[i] : starts[i + 1]].unflatten(1, [b - a for a, b in box] or [1])
        found[str(i)] = _Piece.of(view if shape else view[:, 0], shape, box, layout.owns(layout.rank, i))
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
