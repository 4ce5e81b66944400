"""The loss of an objective away from its point: parameters are set temporarily, then restored.

Storage is exchanged, not written: a parameter shows other numbers for a while and then its own again, bit for bit, also
after an error or Ctrl-C. Its version does not change, so graphs that an objective keeps at its own point stay valid.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from curvature.autograd.backward import joined, no_autocast, pull_back
from curvature.data.parts import take
from curvature.data.tensors import move_batch, tensors_in
from curvature.engine.evaluation import Evaluation
from curvature.environment.lock import one_at_a_time
from curvature.errors import CurvatureError, DataError, InputError, NonFiniteError
from curvature.objective.interface import ObjectiveLike
from curvature.objective.ranks import together
from curvature.objective.shards import refuse_by_module
from curvature.sharding.tensors import whole

__all__ = ["PointLoss", "gradient_at", "loss_at", "rows_at_once", "shifted"]

_CACHE = 4 * 2**20  # bytes of a layer's output that the next finds in the caches of a core
_ROUNDING = 1e3  # units of rounding by which the losses of pieces may differ from those of other passes
_APART = 0.1  # of the parameters' root mean square: how far away they are compared as well
_EPS = 2.0**-53  # a batch next to which all others weigh nothing has no deviation either


@dataclass(frozen=True, kw_only=True)
class PointLoss:
    """The loss at one point, and how far other data would move it."""

    value: float
    """L; NaN where it is not finite."""
    stderr: float
    """One standard error over data of the same size, from the spread over batches; NaN with fewer than two."""


@contextlib.contextmanager
def shifted(objective: ObjectiveLike, point: Tensor, *, buffers: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Have the model's parameters be `point` (n,) inside the context; they are restored bit for bit.

    Entries are rounded to the dtype of their parameter. Graphs that the objective keeps belong to its own point: asking
    the objective itself for anything inside drops them, `loss_at` and `gradient_at` leave them alone.

    Args:
        objective: whose chosen parameters are set.
        point: (n,), in the order of `objective.space`.
        buffers: name -> values of some of the model's buffers, which are set likewise.

    Raises:
        InputError: for a vector of another shape, a buffer that the model does not have, and a sharded model of which
            no rank holds whole parameters.
    """
    refuse_by_module(objective.shards, "the function away from its point")
    parts = objective.space.to_dict(whole(point).detach().to(objective.device))
    changes = [(tensor, parts[name].to(tensor.dtype)) for name, tensor in objective.space.tensors.items()]
    if buffers:
        known = dict(objective.model.named_buffers())
        for name, values in buffers.items():
            if name not in known or known[name].shape != values.shape:
                shape = tuple(values.shape)
                raise InputError(
                    f"buffers must name buffers of the model, in their shapes; {name!r} of {shape} is none."
                )
            changes.append((known[name], values.detach().to(known[name])))
    shards = objective.shards
    with one_at_a_time:
        originals = [tensor.data for tensor, _ in changes]
        try:
            if shards is not None:
                shards.pinned = True
            for tensor, values in changes:
                tensor.data = torch.empty_like(tensor.data).copy_(values)  # in the memory format that it had
            yield
        finally:
            for (tensor, _), original in zip(changes, originals, strict=True):
                tensor.data = original
            if shards is not None:
                shards.pinned = False


@together
def loss_at(
    objective: ObjectiveLike,
    point: Tensor,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    at_once: int | None = None,
) -> PointLoss:
    """Return L at `point` (n,), with its standard error over the data. Cost: a forward pass; no graph is recorded.

    With weights w_b, p_b = w_b / sum w and B batches of losses l_b, the standard error of this ratio of sums is

        stderr^2 = sum_b p_b^2 (l_b - L)^2 / (1 - p_b),

    whatever makes the weights differ, and s^2 / B where they are equal. For objectives that sum, B times that of the
    mean.

    Args:
        objective: the function; it stays at its own point.
        point: (n,).
        buffers: as `shifted` takes them.
        batches: other data than the objective's own.
        at_once: how many examples go through the model at a time, as `rows_at_once` says; None for a batch or piece.

    Raises:
        InputError: for a vector of another shape; with `at_once`, for anything but a positive number, a loss or weights
            of one's own, a loader's batches, outputs that are no tensor and a model that draws random numbers.
        DataError: if no batch counts.
    """
    if at_once is not None:
        _check_at_once(objective, at_once)
    with shifted(objective, point, buffers=buffers):
        try:
            losses = _batch_losses(objective, batches, recorded=False, at_once=at_once)
        except RuntimeError:  # a forward pass that differentiates in the parameters itself
            losses = _batch_losses(objective, batches, recorded=True, at_once=at_once)
    ranks = objective.ranks
    weight, total, count = sum(w for w, _ in losses), sum(w * loss for w, loss in losses), float(len(losses))
    if ranks is not None:
        packed, weight = ranks.sum(_packed(objective, total, count), weight)
        total, count = packed.tolist()
    if weight == 0:
        raise DataError("the weights of all batches are zero: no target counts (all ignored or masked?).")
    mean = total / weight
    shares = [(w / weight, loss) for w, loss in losses]
    variance = sum((loss - mean) ** 2 * p**2 / max(1 - p, _EPS) for p, loss in shares) if count > 1 else math.nan
    if ranks is not None:
        packed, _ = ranks.sum(_packed(objective, variance), 0.0)
        variance = float(packed)
    scale = count if objective.is_sum else 1.0
    value, stderr = scale * mean, scale * math.sqrt(variance) if variance == variance else math.nan
    return PointLoss(value=value if math.isfinite(value) else math.nan, stderr=stderr)


def rows_at_once(objective: ObjectiveLike) -> int | None:
    """Return how many examples go through the model at a time fastest, whatever pieces the data are cut into.

    Pieces from which an error over the data comes are small, and cost a pass each; of all data at once the outputs of
    layers leave the caches. So on a CPU the largest output is 4 MiB a thread, or as large as the parameters. None,
    which is a pass for each batch or piece, where the loss is the model's own, where the batches are a loader's or one
    of several ranks', where the graphs of all pieces are not kept (a pass without a graph takes their place in memory),
    and where losses come out as others, at the point or beside it: batch statistics, dropout. Cost: five losses, once
    for all calls at a point.
    """
    known = objective.freshness.measured()
    if "rows at once" not in known:
        known["rows at once"] = _rows_at_once(objective)
    found: int | None = known["rows at once"]
    return found


def _has_pieces(objective: ObjectiveLike) -> bool:
    evaluator = objective.evaluator
    return evaluator.rule is not None and evaluator.weight is None and objective.source.in_memory


def _check_at_once(objective: ObjectiveLike, at_once: int, *, alone: bool = False) -> None:
    if at_once < 1 or not _has_pieces(objective) or (alone and objective.ranks is not None):
        raise InputError(
            f"at_once= must be positive, and takes batches in memory and a loss from outputs and targets, without "
            f"weight=, got {at_once}: leave it out, or take what rows_at_once(objective) says."
        )


def _rows_at_once(objective: ObjectiveLike) -> int | None:
    source = objective.source
    if not _has_pieces(objective) or objective.ranks is not None:
        return None
    if not (source.whole or objective.keeps_all_graphs):
        return None
    try:
        count = max(of_batch for _, of_batch, _ in source.uncut(sys.maxsize))
        with _outputs_measured() as sizes:
            _batch_losses(objective, None, recorded=False, at_once=count)
        fitting = max(_CACHE * torch.get_num_threads(), sum(p.nbytes for p in objective.space.tensors.values()))
        passes = math.ceil(max(sizes, default=0) / fitting) if objective.device.type == "cpu" else 1
        if passes <= 1 and source.whole:
            return None
        count = math.ceil(count / max(passes, 1))
        here = objective.space.current()
        away = torch.randn(len(here), generator=torch.Generator().manual_seed(0)).to(here)
        away = here + _APART * here.square().mean().sqrt() * away  # what vanishes at a point may not beside it
        same = True
        for point in (here, away):
            with shifted(objective, point):
                same = same and _agree_at_once(objective, count)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, CurvatureError):
        return None
    return count if same else None


def _agree_at_once(objective: ObjectiveLike, at_once: int) -> bool:
    """Say whether losses of pieces come out alike, up to rounding, from passes of so many examples."""
    apart = _batch_losses(objective, None, recorded=False)
    found = _batch_losses(objective, None, recorded=False, at_once=at_once)
    eps = max(torch.finfo(p.dtype).eps for p in objective.space.tensors.values())
    return len(apart) == len(found) and all(
        w == v and abs(a - b) <= eps * (1 + _ROUNDING * abs(a)) for (w, a), (v, b) in zip(apart, found, strict=True)
    )


@contextlib.contextmanager
def _outputs_measured() -> Iterator[list[int]]:
    sizes = list[int]()
    measure = register_module_forward_hook(lambda *call: sizes.extend(t.nbytes for t in tensors_in(call[-1])))
    try:
        yield sizes
    finally:
        measure.remove()


def gradient_at(
    objective: ObjectiveLike,
    point: Tensor,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    at_once: int | None = None,
) -> tuple[float, Tensor]:
    """Return L and its gradient (n,) at `point` (n,). Cost: one gradient.

    Args:
        objective: the function; it stays at its own point.
        point: (n,).
        buffers: as `shifted` takes them.
        at_once: as for `loss_at`.

    Raises:
        InputError: for a vector of another shape; with `at_once` as for `loss_at`, and on several ranks.
        NonFiniteError: if the loss is not finite there.
    """
    if at_once is not None:
        _check_at_once(objective, at_once, alone=True)
        with shifted(objective, point, buffers=buffers):
            mean = objective.mean(_gradients_of_pieces(objective, at_once))
        return float(mean[0]), mean[1:]
    there = objective.replace(keep_graphs=False)
    with shifted(there, point, buffers=buffers):
        loss, gradient = there.loss_and_gradient()
    return float(loss), gradient


def _gradients_of_pieces(objective: ObjectiveLike, at_once: int) -> Iterator[tuple[float, Tensor]]:
    """Yield of every batch that was cut its weight, and its loss and gradient (1 + n,) from so many examples a pass."""
    evaluator, params = objective.evaluator, list(objective.space.tensors.values())
    with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()), no_autocast(objective.device):
        for pieces in _of_batches(objective, at_once):
            known = [(weight, loss) for weight, loss in pieces if weight != 0]
            weight = sum(weight for weight, _ in known)
            if not known:
                continue
            shares = [1.0 if objective.is_sum else each / weight for each, _ in known]
            loss = torch.stack([share * loss for share, (_, loss) in zip(shares, known, strict=True)]).sum()
            parts = pull_back([loss], params) if loss.requires_grad else [None] * len(params)
            found = torch.cat([loss.detach().to(objective.dtype)[None], joined(parts, params, objective.dtype)])
            if not bool(found.isfinite().all()):
                raise NonFiniteError(f"the loss, or its gradient, is not finite at that point: L = {float(loss):.4g}.")
            yield 1.0 if objective.is_sum else weight, found


def _packed(objective: ObjectiveLike, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=objective.device)


def _batch_losses(
    objective: ObjectiveLike, batches: Sequence[Any] | None, *, recorded: bool, at_once: int | None = None
) -> list[tuple[float, float]]:
    """Return (weight, loss) of this rank's batches that count; a batch whose loss overflows has the loss NaN."""
    evaluator, found = objective.evaluator, list[tuple[float, float]]()
    with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()):
        try:
            if not recorded:  # grad mode stays on, for forward passes that differentiate in their inputs
                for p in evaluator.parameters:
                    p.requires_grad_(False)
            if at_once is not None and batches is None:
                of_pieces = itertools.chain.from_iterable(_of_batches(objective, at_once))
                return [(weight, float(loss.detach())) for weight, loss in of_pieces if weight != 0]
            walk = ((index, batch) for index, _, batch in objective.source) if batches is None else enumerate(batches)
            for index, batch in walk:
                evaluation = _evaluated(objective, batch, index)
                if evaluation is None:
                    found.append((1.0, math.nan))
                elif evaluation.weight != 0:
                    found.append((evaluation.weight, float(evaluation.loss.detach())))
        finally:
            for p in evaluator.parameters:
                p.requires_grad_(True)
    return found


def _evaluated(objective: ObjectiveLike, batch: Any, index: int) -> Evaluation | None:
    evaluator = objective.evaluator
    try:
        with evaluator.copy_buffers().installed():
            return evaluator.evaluate(move_batch(batch, objective.device), index)
    except NonFiniteError:
        return None


def _of_batches(objective: ObjectiveLike, at_once: int) -> Iterator[list[tuple[float, Tensor]]]:
    """Yield for every batch as it was given (weight, loss) of its pieces, from outputs of so many examples a pass."""
    rule = objective.evaluator.rule
    assert rule is not None
    for batches, count, pieces in objective.source.uncut(at_once):
        parts = [_evaluated(objective, batch, 0) for batch in batches]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            yield [(1.0, torch.tensor(math.nan))] * len(pieces)
            continue
        if any(part.drew_random_numbers or not isinstance(part.outputs, Tensor) for part in known):
            raise InputError(
                "at_once= takes a model that draws no random numbers and whose outputs are a tensor: leave it out."
            )
        outputs, targets = (torch.cat([getattr(part, what) for part in known]) for what in ("outputs", "targets"))
        found = []
        for rows in pieces:
            z, y = (take(of, rows, count, flattened=True) for of in (outputs, targets))
            found.append((1.0 if rule.reduction == "sum" else rule.num_terms(z, y), rule.value(z, y)))
        yield found
