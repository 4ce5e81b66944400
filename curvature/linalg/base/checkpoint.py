"""Runs that go on where they were cut off: what has come out so far, in a folder, and what the run was given.

A run is a series of pieces, which are written when they are done, small ones together (`piece`), and within a piece the
newest state of a recurrence (`keep`, `kept`). The same call on the same folder takes both from there instead of
computing them, and draws its random numbers anew, so that it ends with the bits that an uninterrupted one ends with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from curvature.errors import InputError
from curvature.fingerprints.portable import argument
from curvature.linalg.base.one_writer import LOCK, hold
from curvature.linalg.base.places import normal_rows
from curvature.linalg.base.validate import product_noise
from curvature.linop import MatrixLike, as_matrix
from curvature.sharding.collectives import explained
from curvature.sharding.files import read, write
from curvature.sharding.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NOT_KEPT", "AnyCheckpoint", "Checkpoint", "open_run"]

_T = TypeVar("_T")

SHARE = 0.05
"""Of the time of a run, that small pieces and states of its recurrence may take to be written."""
_LARGE = 1 << 26  # bytes of pieces that do not wait for that

_FACTS = "run.json"
_OURS = {LOCK, f"{_FACTS}.new"}  # what an empty folder may hold
_FORM = 1  # of what algorithms write, and of the random numbers that they draw beside it
_BESIDE = {"A", "matrix", "callback", "progress", "checkpoint"}  # arguments that are not compared, or by products


class Checkpoint:
    """A folder with what a run has come to.

    Args:
        folder: where; None keeps nothing.
        layout: of the vectors of the run; None where they are whole.
        group: the ranks that make the run together; None for a single process.
        device: of the matrix.
        alone: keep other processes from the folder.

    Raises:
        InputError: if another process is at it, or pieces are missing.
    """

    def __init__(
        self,
        folder: Path | None,
        layout: Layout | None = None,
        group: ProcessGroup | None = None,
        device: torch.device | None = None,
        alone: bool = False,
    ) -> None:
        self._folder, self._layout, self._group = folder, layout, group
        self._device = device or torch.device("cpu")
        self._count = self._number = 0  # pieces so far, states so far
        self._pieces: list[str] = []  # names of those on disk, in their order
        self._ahead: list[Any] = []  # read, for the next pieces
        self._behind: list[Any] = []  # not yet written
        self._saved, self._state = 0, None
        if folder is not None:
            import_module("torch.distributed.checkpoint")  # half a second, before a write is timed
            if alone:
                self._from_first(lambda: self._hold(folder))
            self._pieces, self._state = self._from_first(lambda: _found(folder))
            self._saved = int(self._pieces[-1].rpartition("-")[2]) if self._pieces else 0
        self._since, self._steps, self._due = time.perf_counter(), 0, 1

    def part(self, name: str) -> Checkpoint:
        """Return what a run within this one keeps."""
        folder = None if self._folder is None else self._folder / name
        return Checkpoint(folder, self._layout, self._group, self._device)

    def piece(self, compute: Callable[[], _T]) -> _T:
        """Return what `compute` returns or has returned: tensors and plain values in lists, tuples and dictionaries."""
        if self._folder is None:
            return compute()
        if self._count < self._saved:
            self._count += 1
            if not self._ahead:
                self._ahead = read(self._folder / self._pieces.pop(0), self._layout, self._device, self._group)
            self._since = time.perf_counter()
            found: _T = self._ahead.pop(0)
            return found
        found = compute()
        self._count += 1
        self._behind.append(found)
        self._steps += 1
        size = sum(
            t.nbytes for t in tree_leaves(self._behind) if isinstance(t, Tensor)
        )  # of whole ones: alike on ranks
        if self._steps >= self._due or size >= _LARGE:
            self._written(self._write_pieces)
        else:  # what the run may write to
            self._behind[-1] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, found)
        return found

    def _write_pieces(self) -> None:
        if self._folder is not None and self._behind:
            name = f"piece-{self._count - len(self._behind):06}-{self._count:06}"
            write(self._behind, self._folder / name, self._group)
            self._behind = []
            self._clear(lambda name: name.startswith("state-"))

    def _written(self, act: Callable[[], None]) -> None:
        """Write, and reckon after how many steps that is due again."""
        begun = time.perf_counter()
        act()
        worth = (time.perf_counter() - begun) / SHARE / max((begun - self._since) / self._steps, 1e-9)
        self._due = max(self._told(max(1, math.ceil(worth))))
        self._steps, self._since = 0, time.perf_counter()

    def keep(self, state: Callable[[], Any]) -> None:
        """Write the state that a recurrence needs to go on, unless that would take more than a share of its time."""
        if self._folder is None:
            return
        self._steps += 1
        if self._steps < self._due:
            return
        self._written(lambda: self._write_state(state()))

    def _write_state(self, state: Any) -> None:
        assert self._folder is not None
        self._write_pieces()
        name = f"state-{self._count:06}-{self._number:06}"
        write(state, self._folder / name, self._group)
        self._clear(lambda other: other.startswith("state-") and other != name)
        self._number += 1

    def kept(self) -> Any:
        """Return the newest state of the piece that comes next; None if there is none."""
        name, self._state = self._state, None
        if self._folder is None or name is None or self._count != self._saved:
            return None
        self._number = int(name.rpartition("-")[2]) + 1
        return read(self._folder / name, self._layout, self._device, self._group)

    # -- ranks --------------------------------------------------------------------------------------------------------

    def _told(self, mine: _T) -> list[_T]:
        """Return what all ranks have."""
        if self._group is None:
            return [mine]
        every: list[Any] = [None] * self._group.size()
        with explained():
            dist.all_gather_object(every, mine, group=self._group)
        return every

    def _from_first(self, act: Callable[[], _T]) -> _T:
        """Return what `act` returns on the first rank, or raise what it raises there, on all."""
        found: tuple[Any, str | None] = (None, None)
        if self._group is None or self._group.rank() == 0:
            try:
                found = act(), None
            except InputError as error:
                found = None, str(error)
            except OSError as error:
                why = error.strerror or error
                found = None, f"{str(self._folder)!r} cannot be written: {why}. Give checkpoint a folder that can."
        result, refused = self._told(found)[0]
        if refused is not None:
            raise InputError(refused)
        value: _T = result
        return value

    def _hold(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or _holds_other_files(folder)):
            return  # refused later, and nothing of it is touched
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder, self)

    def _clear(self, is_old: Callable[[str], bool]) -> None:
        if self._folder is not None and (self._group is None or self._group.rank() == 0):
            for path in list(self._folder.iterdir()):
                if is_old(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _begin(self, facts: dict[str, Any]) -> None:
        """Note what the run was given, or refuse to go on with another one."""
        folder = self._folder
        assert folder is not None
        self._from_first(lambda: _compare(folder, facts))


AnyCheckpoint: TypeAlias = str | Path | Checkpoint | None
"""A folder, or none; a run within another one is given part of what that keeps."""

NOT_KEPT = Checkpoint(None)
"""Keeps nothing."""


def open_run(call: str, given: Mapping[str, Any]) -> Checkpoint:
    """Return what a call keeps, from its arguments by name, `A` and `checkpoint` among them.

    Whether a folder holds a run of the same call is told by settings, and by one product with the matrix.

    Raises:
        InputError: if the folder holds something else, or the run was given something else.
    """
    checkpoint = given["checkpoint"]
    if checkpoint is None:
        return NOT_KEPT
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    A = as_matrix(given["A"], given.get("matrix", None) or "hessian")
    layout: Layout | None = getattr(A, "sharding", None)
    ranks = getattr(A, "ranks", None)
    group = ranks.group if ranks is not None else None if layout is None else layout.group
    settings = {name: value for name, value in given.items() if name not in _BESIDE}
    numbers = {name: found for name, value in settings.items() if (found := _numbers(value, A)) is not None}
    facts: dict[str, Any] = {
        "call": call,
        "versions": _versions(),
        "settings": {name: argument(name, value) for name, value in settings.items() if name not in numbers},
        "in parts": layout is not None,
        "matrix": [list(A.shape), str(A.dtype), A.device.type],
        "numbers": {"the matrix": _of_product(A, A), **numbers},
        "tolerance": max(1e4 * torch.finfo(A.dtype).eps, 10 * product_noise(A)),
    }
    if (parameters := _made_of(A)) is not None:
        facts["parameters"] = _sums([parameters])
    saved = Checkpoint(Path(checkpoint), layout, group, A.device, alone=True)
    if len({*saved._told(str(checkpoint))}) > 1:
        raise InputError("the ranks differ in checkpoint: give all of them one folder, which they all reach.")
    saved._begin(facts)
    return saved


def _made_of(A: Any) -> Tensor | None:
    """Return the parameters that a matrix, or the parts that it is made of, is a function of."""
    if A is None or isinstance(A, Tensor):
        return None
    own: Tensor | None = getattr(A, "made_of", None)
    parts = (_made_of(getattr(A, name, None)) for name in ("A", "B"))
    return own if own is not None else next((found for found in parts if found is not None), None)


def _found(folder: Path) -> tuple[list[str], str | None]:
    """Return the pieces that there are, and the newest state of the next one; what was not written to its end goes."""
    names = []
    for path in sorted(folder.glob("*-*")) if folder.is_dir() else []:
        if not path.name.startswith(("piece-", "state-")):
            continue
        if (path / ".metadata").exists():  # written last, when all ranks are done
            names.append(path.name)
        else:
            shutil.rmtree(path)
    pieces = [name for name in names if name.startswith("piece-")]
    count = 0
    for name in pieces:
        first, stop = map(int, name.split("-")[1:])
        if first != count:
            raise InputError(
                f"the run in {str(folder)!r} lacks {f'piece-{count:06}'!r}: restore it, or take a new folder."
            )
        count = stop
    states = [name for name in names if name.startswith(f"state-{count:06}-")]
    return pieces, states[-1] if states else None


def _compare(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / _FACTS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or _holds_other_files(folder)):
            raise InputError(f"{str(folder)!r} holds no run, but other files: give checkpoint a folder of its own.")
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{_FACTS}.new"
        new.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        new.replace(path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = _differences(before, facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{str(path)!r} is damaged: give checkpoint a new folder.") from error
    if differ:
        raise InputError(
            f"{str(folder)!r} holds a run that differs in {', '.join(differ)}: make the call that began it, or give "
            "checkpoint a new folder."
        )


def _holds_other_files(folder: Path) -> bool:
    """Whether there is something in a folder, and no run."""
    return not (folder / _FACTS).exists() and any(path.name not in _OURS for path in folder.iterdir())


def _versions() -> str:
    """Return what must be alike for the rest of a run to suit what there is: the same numbers are drawn again."""
    own = "from a checkout"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        own = importlib.metadata.version("torch-curvature")
    return f"torch {torch.__version__}, torch-curvature {own}, form {_FORM}"


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between what a run was given and what it is given now, for people."""
    if before["call"] != now["call"]:
        return [f"what is computed ({before['call']}, now {now['call']})"]
    if now["in parts"] and not before["in parts"]:
        return ["how vectors are held (whole, now in parts)"]
    if before["matrix"] != now["matrix"]:
        shown = [
            f"{shape[0]} x {shape[1]}, {dtype}, {device}" for shape, dtype, device in (before["matrix"], now["matrix"])
        ]
        return [f"the matrix ({shown[0]}, now {shown[1]})"]
    if before.get("versions") != now["versions"]:
        return [f"the versions of the libraries ({before.get('versions', 'not noted')}; now {now['versions']})"]
    found = []
    if not _near(before.get("parameters"), now.get("parameters"), 1e-9):
        found.append("the parameters of the model")
    tolerance = max(before["tolerance"], now["tolerance"])
    old, new = before["numbers"], now["numbers"]
    if not found and not _near(old["the matrix"], new["the matrix"], tolerance):
        found.append("the matrix, whose products are others")
    names = [name for name in {**old, **new} if name != "the matrix"]
    found += [name for name in names if not _near(old.get(name), new.get(name), tolerance)]
    old, new = before["settings"], now["settings"]
    return found + [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _near(a: list[float] | None, b: list[float] | None, tolerance: float) -> bool:
    """Whether numbers, the first of which says how large an error is, are alike."""
    if a is None or b is None or len(a) != len(b):
        return a is b
    return all(abs(x - y) <= tolerance * abs(a[0]) or x == y for x, y in zip(a, b, strict=True))


def _numbers(value: Any, A: MatrixLike) -> list[float] | None:
    """Return numbers that tell a tensor, a collection of them or a matrix from others; None for anything else."""
    if tuple(getattr(value, "shape", ())) == tuple(A.shape) and not isinstance(value, Tensor):
        return _of_product(value, A)
    tensors = list(_tensors(value))
    return _sums(tensors) if tensors else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _sums(tensors: list[Tensor]) -> list[float]:
    """Return norm, sum and sum of cubes in units of the norm squared, of all entries together, in any order."""
    square = total = cubes = 0.0
    for t in tensors:
        x = t.detach().double()
        square += float((x * x).sum())
        total += float(x.sum())
        cubes += float((x * x * x).sum())
    norm = math.sqrt(square)
    return [norm, total, cubes / square if square else 0.0]


def _of_product(M: Any, A: MatrixLike) -> list[float]:
    """Return the norm of a product of M with a random vector of A's, and two inner products with it."""
    x, y = normal_rows(A, 2, torch.Generator(A.device).manual_seed(20))
    found = (M @ x.to(getattr(M, "dtype", A.dtype))[:, None])[:, 0].double()
    return [float(torch.linalg.vector_norm(found)), float((found * x).sum()), float((found * y).sum())]
