"""Critical sharpness: how far along an update the loss stays below its start, from a handful of forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from analysis.training.results import CriticalSharpness, CriticalStatus
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.shift import loss_at

__all__ = ["critical_sharpness", "search_critical_step"]

_FAR, _NEAR = 8.0, 1.5  # by how much a step grows at most and at least while the loss has not come back
_SEEN = 20.0  # roundings of the loss below which its change tells nothing


@in_whole_vectors
@full_precision
@checked
def critical_sharpness(
    objective: Objective, update: Tensor, *, lr: float, max_losses: int = 6, rtol: float = 0.02
) -> CriticalSharpness:
    """Return 2 / lr_c, lr_c the learning rate at which a step along the update leaves the loss where it was.

    The update u is the step that an optimizer took, or would take, with learning rate lr; then lr_c = a lr with a the
    root of phi(a) = (L(theta + a u) - L(theta)) / a, whose value at 0 is g'u. It is bracketed by secants that grow 1.5
    to 8 times, and narrowed by secants that are kept inside, until the bracket is narrower than `rtol` or the forward
    passes are spent. On a quadratic and for gradient descent it is no larger than the sharpness.

    With the objective of another loss and the update of this one it is the relative critical sharpness: how much of a
    training on new data an old loss stands.

    Against scans of 200 points along the updates of SGD, momentum and Adam, errors stay below 5 % where there is a
    bracket. Where there is more than one root, it is one of them. Cost: one gradient and at most `max_losses` losses.

    Args:
        objective: at theta, where the update starts.
        update: u, (n,).
        lr: learning rate that the update was made with.
        max_losses: forward passes, at least 3.
        rtol: relative width of the bracket at which the search ends early.

    Raises:
        InputError: for an update of another shape, or arguments out of range.
        NonFiniteError: if the loss at theta is not finite.

    Reference: Kalra et al. (2026), A scalable measure of loss landscape curvature for analyzing the training dynamics
    of LLMs (arXiv 2601.16979).

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> objective = Objective(model, nn.MSELoss(), (torch.ones(4, 1), torch.zeros(4, 1)))  # w^2, curvature 2
        >>> found = critical_sharpness(objective, torch.tensor([-0.2]), lr=0.1)  # the step of gradient descent
        >>> round(found.value, 3), found.status.name
        (2.0, 'OK')
    """
    if update.shape != (objective.num_params,):
        raise InputError(f"update must have shape ({objective.num_params},), got {tuple(update.shape)}.")
    if not 0 < lr < math.inf or max_losses < 3 or not 0 < rtol < 1:
        raise InputError(
            f"lr must be positive, max_losses at least 3 and rtol below 1, got {lr}, {max_losses}, {rtol}."
        )
    loss, gradient = objective.loss_and_gradient()
    update = update.to(gradient)
    return search_critical_step(
        losses_along(objective, objective.space.current(), update),
        float(loss),
        float(gradient @ update),
        lr=lr,
        max_losses=max_losses,
        rtol=rtol,
        eps=rounding_of(objective),
    )


def losses_along(
    objective: Objective, here: Tensor, update: Tensor, batches: list[Any] | None = None
) -> Callable[[float], float]:
    """Return a -> L(here + a update), NaN where it is not finite."""
    return lambda a: loss_at(objective, here + a * update, batches=batches).value


def rounding_of(objective: Objective) -> float:
    """Return the relative rounding of the loss."""
    return max(torch.finfo(p.dtype).eps for p in objective.space.tensors.values())


def search_critical_step(
    loss_along: Callable[[float], float],
    start: float,
    slope: float,
    *,
    lr: float,
    max_losses: int,
    rtol: float,
    eps: float,
    first: float = 1.0,
    known: dict[float, float] | None = None,
) -> CriticalSharpness:
    """Search for the root; see `critical_sharpness`.

    Args:
        loss_along: a -> loss at a times the update; not finite counts as above the start.
        start: loss at a = 0.
        slope: derivative at a = 0.
        lr: learning rate of a = 1.
        max_losses: evaluations.
        rtol: of the bracket.
        eps: relative rounding of the loss.
        first: where to begin.
        known: a -> loss where it is known already.
    """
    seen, spent = dict(known or {}), 0
    if not slope < 0:
        return _found(math.nan, 0.0, math.inf, lr, 0, CriticalStatus.ASCENT)
    low, phi_low, high, phi_high = 0.0, slope, math.inf, math.nan
    a, narrow, before = first, False, (0.0, slope)
    while not narrow:
        if a not in seen:
            if spent == max_losses:
                break
            seen[a], spent = loss_along(a), spent + 1
        loss = seen[a]
        phi = (loss - start) / a if math.isfinite(loss) else math.inf
        if phi < 0:
            bend = (phi - slope) / a
            low, phi_low = a, phi
        else:
            high, phi_high = a, phi
        if high == math.inf:
            root = -slope / bend if bend > 0 else math.inf
            a = min(max(root, _NEAR * low), _FAR * low)
            continue
        narrow = high - low <= rtol * low or phi == 0
        here, same_side = (a, phi), (phi < 0) == (before[1] < 0)
        a = _inside(low, phi_low, high, phi_high, *((before, here) if same_side else ()))
        before, narrow = here, narrow or a in (low, high)  # rounding leaves nothing between
    if high == math.inf or (math.isinf(phi_high) and not narrow):
        return _found(low, low, high, lr, spent, CriticalStatus.NO_BRACKET)
    root = high if phi_high == 0 else _secant(low, phi_low, high, phi_high)
    depth = -slope * root / 4  # of the parabola with this slope and root
    if depth < _SEEN * eps * abs(start):
        return _found(math.nan, low, high, lr, spent, CriticalStatus.ROUNDING)
    return _found(root, low, high, lr, spent, CriticalStatus.OK)


def _secant(low: float, phi_low: float, high: float, phi_high: float) -> float:
    if not math.isfinite(phi_high):
        return math.sqrt(low * high) if low > 0 else high / _FAR
    return low + (high - low) * -phi_low / (phi_high - phi_low)


def _inside(low: float, phi_low: float, high: float, phi_high: float, *latest: tuple[float, float]) -> float:
    """Return where to look next: near the root of a secant, on the side where the bracket is wide, and not at its ends.

    The secant is that of the ends, or of the two latest points where they lie on one side of the root: where phi bends,
    secants with an end that stays come nearer from one side only, and slowly.
    """
    root, width = _secant(low, phi_low, high, phi_high), high - low
    if latest and latest[0][1] != latest[1][1] and all(math.isfinite(phi) for _, phi in latest):
        other = _secant(*latest[0], *latest[1])
        root = other if low < other < high else root
    return max(root, high / 16) if low == 0 else min(max(root, low + 0.02 * width), high - 0.02 * width)


def _found(a: float, low: float, high: float, lr: float, spent: int, status: CriticalStatus) -> CriticalSharpness:
    value = 2 / (a * lr) if a > 0 else math.nan
    return CriticalSharpness(value=value, step=a * lr, lower=low * lr, upper=high * lr, num_losses=spent, status=status)
