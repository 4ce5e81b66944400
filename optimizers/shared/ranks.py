"""Means over data-parallel ranks: gradients and curvature of the joined batch, with one collective a dtype.

Where closures return (outputs, targets) ranks count by their loss terms; elsewhere they count alike, as
`DistributedDataParallel` takes it. A parameter that only some ranks used counts
zero on the others; one that no rank used stays without gradient.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError
from curvature.fingerprints.portable import content, text_digest
from curvature.objective.ranks import RankAgreement, failing_together

__all__ = [
    "average_gradients",
    "average_over_ranks",
    "compare_ranks",
    "on_all_ranks",
    "refuse_wrapper",
    "share_of_rank",
]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def compare_ranks(optimizer: Any, call: str, *, point: bool = False, total: Tensor | None = None) -> None:
    """Refuse to go on where a rank failed or is at another call; with `point` where parameters or settings differ.

    Raises:
        RankError: on all ranks.
    """
    ranks = _agreement(optimizer)
    if ranks is None:
        return
    settings, digests = None, None
    if point:
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        digests = {f"parameter {i} of shape {tuple(p.shape)}": content([p]) for i, p in enumerate(params)}
        plain = (bool, int, float, str, tuple, type(None))
        settings = text_digest([sorted((k, v) for k, v in g.items() if isinstance(v, plain)) for g in groups])
    ranks.agree(call, settings=settings, point=digests, total=total)


def refuse_wrapper(name: str, remedy: str) -> AbstractContextManager[Any]:
    """Refuse closures that call `DistributedDataParallel` for what differentiates them on each rank alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return contextlib.nullcontext()

    def refuse(module: Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            raise InputError(
                f"the closure calls DistributedDataParallel, whose averages {name} does not see: ranks would go by "
                f"their own losses and part. {remedy}"
            )

    return register_module_forward_pre_hook(refuse)


def on_all_ranks(method: _Method) -> _Method:
    """Make a method of an optimizer that raises on one rank raise on all of them."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **settings: Any) -> Any:
        if self.process_group is None:
            return method(self, *args, **settings)
        with failing_together(_agreement(self)):
            return method(self, *args, **settings)

    return cast("_Method", wrapped)


def _agreement(optimizer: Any) -> RankAgreement | None:
    group = optimizer.process_group
    return None if group is None else RankAgreement(group, optimizer.param_groups[0]["params"][0].device, group)


def average_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup, share: float = 1.0) -> list[Tensor]:
    """Return the means over the ranks of a group, alike on every rank, of tensors that count by the rank's share."""
    if share != 1:
        tensors = [t * share if share else torch.zeros_like(t) for t in tensors]  # a mean over no terms is 0/0
    means: list[Tensor] = list(tensors)
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        here = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
        dtype = torch.promote_types(kind[0], torch.float32)
        flat = _flatten_dense_tensors([tensors[i] for i in here]).to(dtype)
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for i, mean in zip(here, _unflatten_dense_tensors(flat.to(kind[0]), [tensors[i] for i in here]), strict=True):
            means[i] = mean
    return means


def share_of_rank(optimizer: Any, outputs: Tensor | None, targets: Any) -> float:
    """Return the factor under which a mean over the ranks is that of the joined batch: of losses that sum, their sum.

    1 where the closure returned the loss itself, so that nobody knows how much a rank counts.
    """
    rule, group = optimizer._rule, optimizer.process_group
    is_sum = rule is not None and outputs is not None and rule.reduction == "sum"
    known = rule is not None and outputs is not None and not is_sum
    terms = float(rule.num_terms(outputs, targets)) if known else math.nan
    ranks = cast("RankAgreement", _agreement(optimizer))
    ranks.agree("shares of a batch")
    if is_sum:
        return float(group.size())
    total = torch.tensor(terms, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total, group=group)
    share = terms * group.size() / float(total) if float(total) != 0 else 1.0
    return share if math.isfinite(share) else 1.0


def average_gradients(params: Sequence[Tensor], group: dist.ProcessGroup, share: float = 1.0) -> None:
    """Replace every `.grad` by its mean over the ranks of a group, which count by their share.

    Waits for the device only on ranks that did not use some parameter, which must learn whether others did.
    """
    RankAgreement(group, params[0].device, group).agree("gradients")
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    local = [torch.zeros_like(p) if p.grad is None or share == 0 else p.grad * share for p in params]
    *means, shares = average_over_ranks([*local, used], group)
    anywhere = [True] * len(params) if all(p.grad is not None for p in params) else (shares > 0).tolist()
    for p, mean, is_used in zip(params, means, anywhere, strict=True):
        if is_used:
            p.grad = mean if p.grad is None else p.grad.copy_(mean)
