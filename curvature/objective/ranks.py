"""Data-parallel sums: each rank holds its part of the data and all of the parameters.

Before every sum the ranks compare what they are about to add up in one small collective: whether one of them failed,
that they are at the same call, and that parameters, buffers, settings and vectors are alike. Where not, all of them
raise; none waits for another.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.environment.device import is_gpu
from curvature.errors import DataError, RankError
from curvature.fingerprints.portable import argument, content, text_digest
from curvature.objective.shards import Shards, is_part, spread
from curvature.sharding.collectives import apart, explained
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from curvature.losses.rules import LossRule
    from curvature.parameters import ParameterSpace

__all__ = [
    "Compared",
    "RankAgreement",
    "built_together",
    "failing_together",
    "sum_over_ranks",
    "together",
]

_Init = TypeVar("_Init", bound=Callable[..., None])
_Function = TypeVar("_Function", bound=Callable[..., Any])

_NONE = -(2**62)  # of a rank that has nothing to compare
_FIELDS = ("failed", "call", "settings", "point", "vectors", "step", "dtype", "ndim", *(f"size {i}" for i in range(4)))
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sum_over_ranks(total: Tensor, weight: float, group: ProcessGroup) -> tuple[Tensor, float]:
    """Return the sums of `total` and `weight` over the ranks of a group, alike on every rank. One collective."""
    packed = torch.cat([total.reshape(-1), total.new_tensor([weight])])
    if total.dtype == torch.float32:
        packed = packed.double()  # a count above 2^24 would be rounded in float32
        packed[-1] = weight
    with explained():
        dist.all_reduce(packed, group=group)
    return packed[:-1].view_as(total).to(total.dtype), float(packed[-1])


class Point(Protocol):
    """The present point of an objective."""

    def current(self) -> object:
        """Return the same object until anything changes."""


class Compared(Protocol):
    """What the ranks compare of an objective."""

    model: nn.Module
    rule: LossRule | None
    settings: dict[str, Any]
    ranks: RankAgreement | None
    shards: Shards | None
    device: torch.device

    @property
    def freshness(self) -> Point: ...

    @property
    def space(self) -> ParameterSpace: ...

    @property
    def is_sum(self) -> bool: ...


def _point_digests(objective: Compared) -> dict[str, int]:
    """Return the digests of all that the loss depends on beside the data: parameters, buffers, modes, the criterion."""
    found: dict[str, int] = {}
    for name, p in objective.model.named_parameters():
        if not is_part(p):  # of which ranks hold different parts
            found[f"parameter {name!r}"] = content([p])
    for path, module in objective.model.named_modules():
        ignored = isinstance(module, nn.modules.batchnorm._NormBase) and module.training  # its statistics are not used
        for name, buffer in module._buffers.items():
            if buffer is not None and not ignored:
                found[f"buffer {'.'.join(filter(None, (path, name)))!r}"] = content([buffer])
    found["training modes"] = text_digest([m.training for m in objective.model.modules()])
    loss = None if objective.rule is None else objective.rule.loss
    if isinstance(loss, functools.partial):
        found["settings of the loss"] = _of_mapping(loss.keywords)
    elif loss is not None and hasattr(loss, "__dict__"):
        found["settings of the loss"] = _of_mapping({**vars(loss), **getattr(loss, "_buffers", {})})
    return found


def _of_mapping(values: Mapping[str, Any]) -> int:
    plain = {k: v for k, v in values.items() if isinstance(v, (int, float, str, bool, type(None)))}
    return text_digest(sorted(plain.items()), content(v for v in values.values() if isinstance(v, Tensor)))


# -- agreement --------------------------------------------------------------------------------------------------------


class RankAgreement:
    """Compares the ranks of an objective.

    Args:
        group: all of them.
        device: of the parameters.
        data: those that hold different data, which are summed over; None where all hold the same.

    Raises:
        RankError: on all ranks, where something differs, and where another rank failed.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, data: ProcessGroup | None) -> None:
        self.group, self.data = group, data
        on_device = is_gpu(device) and "nccl" in str(dist.get_backend(group))
        self.device = device if on_device else torch.device("cpu")
        self._point: tuple[Any, dict[str, int]] | None = None

    def agree(
        self,
        call: str,
        *,
        settings: int | Mapping[str, int] | None = None,
        point: Mapping[str, int] | None = None,
        vectors: int | None = None,
        total: Tensor | None = None,
        error: Exception | None = None,
    ) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Compare with the other ranks; return shape and dtype of what is to be added up, as some rank has it."""
        high = self._compared(call, settings, point, vectors, None, total, error)
        if high[7] == _NONE:
            return None
        return tuple(high[8 : 8 + high[7]]), _DTYPES[high[6]]

    @contextlib.contextmanager
    def given(self, call: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Compare what the ranks give to a call, and make it on all ranks, or fail on all."""
        with failing_together(self):
            digests = {name: digest for name, v in arguments.items() if (digest := argument(name, v)) is not None}
            self.agree(call.removesuffix(".__init__"), settings=digests)
            yield

    def step(self, code: int | None, call: str) -> int | None:
        """Return the code of the ranks that have one, the same for all of them; None where none has."""
        high = self._compared(call, None, None, None, code, None, None)
        return None if high[5] == _NONE else high[5]

    def _compared(
        self,
        call: str,
        settings: int | Mapping[str, int] | None,
        point: Mapping[str, int] | None,
        vectors: int | None,
        step: int | None,
        total: Tensor | None,
        error: Exception | None,
    ) -> list[int]:
        """Return, for each of `_FIELDS`, what all ranks have that have something."""
        digest = None if point is None else text_digest(sorted(point.items()))
        sizes: list[int | None] = [None] * 5
        if total is not None:
            sizes = [total.ndim, *total.shape, *(0 for _ in range(4 - total.ndim))]
        dtype = None if total is None else _DTYPES.index(total.dtype)
        told = text_digest(sorted(settings.items())) if isinstance(settings, Mapping) else settings
        values = [int(error is not None), text_digest(call), told, digest, vectors, step, dtype, *sizes]
        if error is not None:
            values[1:] = [None] * (len(_FIELDS) - 1)
        low_high = [_NONE if v is None else v for v in values] + [_NONE if v is None else -v for v in values]
        packed = torch.tensor(low_high, dtype=torch.int64, device=self.device)
        with explained():
            dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        high, low = packed[: len(_FIELDS)].tolist(), [-v for v in packed[len(_FIELDS) :].tolist()]
        if high[0] or any(a != b for a, b in zip(high, low, strict=True) if a != _NONE):
            mine = {"error": None if error is None else f"{type(error).__name__}: {error}", "call": call}
            named = settings if isinstance(settings, Mapping) else {}
            self._refuse(error, {**mine, "values": values, "point": dict(point or {}), "settings": dict(named)})
        return high

    def _refuse(self, error: Exception | None, mine: dict[str, Any]) -> None:
        every: list[Any] = [None] * self.group.size()
        with explained():
            dist.all_gather_object(every, mine, group=self.group)
        failed = [(rank, told["error"]) for rank, told in enumerate(every) if told["error"] is not None]
        if error is not None:
            error._told_ranks = True  # type: ignore[attr-defined]
            raise error
        if failed:
            said = "; ".join(f"rank {rank}: {text}" for rank, text in failed)
            raise _told(f"no rank can go on, as another failed. {said}")
        if len({told["call"] for told in every}) > 1:
            said = ", ".join(f"rank {rank} at {told['call']}" for rank, told in enumerate(every))
            raise _told(f"the ranks are at different calls: {said}. All ranks must make the same calls.")
        for place, name in enumerate(_FIELDS):
            values = [told["values"][place] for told in every]
            known = {v for v in values if v is not None}
            if len(known) > 1:
                raise _told(f"{_different(name, every)}: {_grouped(values)}. {_ADVICE.get(name, _ADVICE['shape'])}")
        raise AssertionError

    @contextlib.contextmanager
    def together(self, call: str) -> Iterator[None]:
        """Do something on each rank, after which all go on, or none where one failed."""
        with failing_together(self):
            yield
            self.agree(call)

    def summed(
        self,
        objective: Compared,
        add: Callable[[], tuple[Tensor | None, float, float]],
        vectors: Sequence[Tensor],
        sharding: Layout | None = None,
    ) -> tuple[Tensor, float, float]:
        """Return (sum, weight, 1) over all ranks of what `add` returns on this one: (total, weight, unit).

        The sum is an ordinary tensor, alike on every rank, or with `sharding` for its last dimension a sharded one.
        """
        with failing_together(self):
            with apart():
                total, weight, unit = add()
            if total is not None and sharding is None:  # else pieces are scaled, which takes less memory
                total = total * unit
            found = self.agree(
                "a sum over the data",
                point=self.digests(objective),
                vectors=content(vectors) if vectors else None,
                total=total,
            )
            if found is None:
                raise _told("the data hold no batch on any rank; pass data that are not empty.", DataError)
        if total is None:
            total = torch.zeros(found[0], dtype=found[1], device=objective.device)
        if sharding is None:
            return *self.added(total, weight), 1.0
        _, weight = self.added(total.new_zeros(0, dtype=torch.float64), weight)
        rows = sharding.summed(total.view(-1, total.shape[-1]), self.data, unit)
        return ShardedTensor(rows.view(*total.shape[:-1], rows.shape[-1]), sharding), weight, 1.0

    def added(self, total: Tensor, weight: float) -> tuple[Tensor, float]:
        """Return the sums over the ranks that hold different data, without a comparison."""
        return (total, weight) if self.data is None else sum_over_ranks(total, weight, self.data)

    def sum(self, total: Tensor, weight: float) -> tuple[Tensor, float]:
        """Return the sums of `total` and `weight` over the ranks."""
        self.agree("a sum", total=total)
        return self.added(total, weight)

    def digests(self, objective: Compared) -> dict[str, int]:
        """Return the digests of all that the loss depends on beside the data, at the present point."""
        mark = objective.freshness.current()
        if self._point is None or self._point[0] is not mark:
            self._point = (mark, _point_digests(objective))
        return self._point[1]

    def same_data(self, place: int, digest: int) -> None:
        """Refuse to go on where ranks at one place among those with different data differ in their first batch."""
        every: list[Any] = [None] * self.group.size()
        with explained():
            dist.all_gather_object(every, (place, digest), group=self.group)
        for here in {p for p, _ in every}:
            digests = {r: d for r, (p, d) in enumerate(every) if p == here}
            if len(set(digests.values())) > 1:
                raise _told(
                    f"ranks {', '.join(map(str, digests))} hold parts of one model for the same data, and differ in "
                    "their first batch. Give the same batches, in the same order, to all ranks of a tensor-parallel "
                    "mesh."
                )

    def joined(self, values: Tensor) -> Tensor:
        """Return (k, N) of all ranks with different data side by side, for (k, N) of this rank's N examples."""
        every: list[Any] = [values.cpu()] * (1 if self.data is None else self.data.size())
        if self.data is not None:
            with explained():
                dist.all_gather_object(every, values.cpu(), group=self.data)
        return torch.cat(every, dim=1).to(values.device)

    def everywhere(self, flag: bool, call: str = "") -> bool:
        """Whether something holds on all ranks; with `call`, compared as what they are at."""
        if call:
            self.agree(call)
        total, _ = sum_over_ranks(torch.tensor([float(flag)], device=self.device), 1.0, self.group)
        return round(float(total)) == self.group.size()

    def mean(self, *values: float) -> list[float]:
        """Return the means over the ranks."""
        total, count = sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=self.device), 1.0, self.group)
        return (total / count).tolist()


_ADVICE = {
    "step": "Where modules depend on the data, give a memory_budget that whole parameters fit in.",
    "settings": "Give all ranks the same architecture, params=, loss and settings, and generators in the same state.",
    "point": "Load or broadcast the same state on all ranks, and the same modes.",
    "vectors": "Give all ranks generators in the same state (the same seed), and the same start vectors.",
    "shape": "All ranks must make the same calls with the same settings.",
}


def _different(name: str, every: list[Any]) -> str:
    if name in ("point", "settings"):
        names = list(dict.fromkeys(n for told in every for n in told[name]))
        which = [n for n in names if len({told[name].get(n) for told in every}) > 1]
        listed = ", ".join(which[:3]) + (f" and {len(which) - 3} more" if len(which) > 3 else "")
        if name == "point":
            return f"the ranks differ in {listed}"
        return f"the ranks differ in what they gave to {every[0]['call']}{f', {listed}' if listed else ''}"
    if name == "step":
        return "the ranks are at different modules"
    if name == "vectors":
        return "the ranks multiply by different vectors"
    return "the ranks add up tensors of different shapes or dtypes"


def _grouped(values: Sequence[Any]) -> str:
    ranks = {v: [r for r, other in enumerate(values) if other == v] for v in values if v is not None}
    return " against ".join(f"rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}" for r in ranks.values())


def _told(text: str, kind: type[Exception] = RankError) -> Exception:
    error = kind(text)
    error._told_ranks = True  # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def failing_together(ranks: RankAgreement | None) -> Iterator[None]:
    """Tell the other ranks of an error before it is raised, so that they do not wait."""
    try:
        yield
    except Exception as error:
        if ranks is not None and not getattr(error, "_told_ranks", False) and not isinstance(error, RankError):
            ranks.agree("an error", error=error)
        raise


def together(function: _Function) -> _Function:
    """Make a function of an objective return on all ranks, or raise on all of them."""

    @functools.wraps(function)
    def wrapped(objective: Compared, *args: Any, **settings: Any) -> Any:
        if objective.ranks is None:
            return function(objective, *args, **settings)
        with objective.ranks.together(function.__name__):
            return function(objective, *args, **settings)

    return cast("_Function", wrapped)


def built_together(init: _Init) -> _Init:
    """Make the constructor of an objective compare its ranks, and fail on all of them where it fails on one."""

    @functools.wraps(init)
    def wrapped(
        self: Compared, model: Any, *args: Any, process_group: ProcessGroup | None = None, **settings: Any
    ) -> None:
        model, self.shards, data = spread(model, process_group)
        group = data if self.shards is None else self.shards.group
        if group is None:
            self.ranks = None
            init(self, model, *args, **settings)
            return
        device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
        self.ranks = RankAgreement(group, device or torch.device("cpu"), data)
        with failing_together(self.ranks):
            init(self, model, *args, process_group=data, **settings)
            self.ranks.agree("Objective", settings=_settings_digest(self))

    return cast("_Init", wrapped)


def _settings_digest(objective: Compared) -> int:
    space, given = objective.space, objective.settings
    loss = given["loss"]
    return text_digest(
        [(name, tuple(t.shape), str(t.dtype)) for name, t in space.tensors.items()],
        [(name, tuple(p.shape)) for name, p in objective.model.named_parameters()],
        [type(m).__qualname__ for m in objective.model.modules()],
        getattr(loss, "__qualname__", type(loss).__qualname__),
        objective.is_sum,
        given["weight"] is None,
        given["seed"],
    )
