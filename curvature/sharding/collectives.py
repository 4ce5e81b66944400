"""Collectives that say what happened where they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.errors import InputError, RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "COUNTS",
    "PIECE",
    "RECEIVED",
    "all_gather",
    "all_reduce",
    "apart",
    "arrive",
    "explained",
    "reduce_scatter",
    "refuse_apart",
]

COUNTS = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
"""How many collectives this process made with tensors that are held in parts."""
RECEIVED = {"bytes": 0}
"""How much it received in gathers and reduce-scatters."""


PIECE = 1 << 17  # entries of all ranks that move at a time on CPUs
"""gloo sums all of a tensor on every rank: so pieces go to where they are added up, and stay in the cache. What it
gathers it copies twice, in threads whose memory the C library keeps: so ranks send each other their parts."""

_TAG = 0x6375  # of these messages
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what a backend raises into an error that says what the ranks should look for.

    Raises:
        RankError: where a connection broke or time ran out.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "another rank of the process group ended, failed outside of this toolkit, or did not come to this call in "
            f"time ({str(error).splitlines()[0][:200]}); all ranks must make the same calls. See what the others wrote."
        ) from error


_apart: ContextVar[bool] = ContextVar("apart", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Refuse sums over entries of sharded tensors: a rank walks over its own data, and others may have no more."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def refuse_apart() -> None:
    """Raise InputError inside `apart`."""
    if _apart.get():
        raise InputError(
            "ranks walk over different data, so nothing can be summed over the entries of a sharded tensor here: take "
            "x.whole() before the walk."
        )


def all_reduce(x: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum, or another reduction, over the ranks; in place where x is contiguous."""
    COUNTS["all_reduce"] += 1
    x = x.contiguous()
    with explained():
        dist.all_reduce(x, op=op, group=group)
    return x


def all_gather(
    x: Tensor, group: ProcessGroup, *, out: Tensor | None = None, later: list[tuple[Any, Tensor]] | None = None
) -> Tensor:
    """Return the x of all ranks, of one shape, (ranks, ...).

    Args:
        x: this rank's.
        group: the ranks.
        out: where they go, contiguous.
        later: takes messages that are still on their way, for `arrive`.
    """
    COUNTS["all_gather"] += 1
    RECEIVED["bytes"] += x.numel() * x.element_size() * (group.size() - 1)
    found = x.new_empty(group.size(), *x.shape) if out is None else out
    mine, me = x.contiguous(), group.rank()
    with explained():
        if x.device.type != "cpu" or x.numel() == 0:
            _ALL_GATHER(found.view(-1), mine.view(-1), group=group)
            return found
        others = [(me + i) % group.size() for i in range(1, group.size())]
        messages = [(group.recv([found[rank]], rank, _TAG), found) for rank in others]
        messages += [(group.send([mine], rank, _TAG), mine) for rank in others]
    found[me] = mine
    if later is None:
        arrive(messages)
    else:
        later += messages
    return found


def arrive(messages: list[tuple[Any, Tensor]]) -> None:
    """Wait until messages have arrived; beside each stands the tensor that it reads or writes."""
    with explained():
        for message, _ in messages:
            message.wait()


def reduce_scatter(x: Tensor, group: ProcessGroup, factor: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """Return the sum over ranks of factor * x[rank], for x of shape (ranks, ...), contiguous; so is `out`, if given."""
    COUNTS["reduce_scatter"] += 1
    RECEIVED["bytes"] += x[0].numel() * x.element_size() * (group.size() - 1)
    found = torch.empty_like(x[0]) if out is None else out
    with explained():
        if x.device.type != "cpu":
            _REDUCE_SCATTER(found.view(-1), (x if factor == 1 else x * factor).view(-1), group=group)
            return found
        width = max(1, PIECE // group.size())
        on_their_way: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        for part, place in zip(x.flatten(1).split(width, dim=1), found.view(-1).split(width), strict=True):
            sent = part * factor
            received = torch.empty_like(sent)
            message = dist.all_to_all_single(received.view(-1), sent.view(-1), group=group, async_op=True)
            on_their_way.append((message, sent, received, place))
            if len(on_their_way) > 1:  # a piece is added up while the next one moves
                _add_up(*on_their_way.pop(0))
        for piece in on_their_way:
            _add_up(*piece)
    return found


def _add_up(message: Any, sent: Tensor, received: Tensor, place: Tensor) -> None:
    """Write the sum over ranks of a piece to its place; `sent` is held until it has arrived."""
    message.wait()
    del sent
    torch.sum(received, dim=0, out=place)
