"""What a closure returns: the loss, (outputs, targets), or residuals; anything else is refused with what to write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.engine.advice import advice_on_loss
from curvature.errors import InputError
from curvature.losses.rules import same_values
from curvature.objective.shards import is_part
from optimizers.shared.differentiation import leaves
from optimizers.shared.gradients import UNREACHED, all_zero

__all__ = ["backward_of", "loss_of", "own_gradients", "residuals_of"]


def loss_of(returned: Any, loss: Callable[..., Tensor] | None) -> tuple[Tensor, Tensor | None, Any]:
    """Return (loss, outputs, targets) of what a closure returned; the latter two are None where it was the loss.

    Raises:
        InputError: if it is neither the loss nor (outputs, targets), or the loss writes into the outputs.
    """
    if loss is not None and isinstance(returned, (tuple, list)) and len(returned) == 2:
        outputs, targets = returned
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"the outputs of (outputs, targets) must be one tensor, got {_kind(outputs)}; return the tensor "
                "that the loss compares with the targets, e.g. (outputs.logits, targets)."
            )
        before, seen = outputs._version, outputs.detach().clone() if _may_write(loss, outputs) else None
        returned = loss(outputs, targets)
        if outputs._version != before or (seen is not None and not same_values(outputs, seen)):
            raise InputError(
                "loss= writes into the outputs (sub_, clamp_, /=), which curvature is taken at: write it in operations "
                "that return new tensors (-, clamp, /), or begin it with outputs = outputs.clone()."
            )
        where = "loss(outputs, targets)"
    else:
        outputs = targets = None
        where = "the closure"
    if not isinstance(returned, Tensor) or returned.numel() != 1:
        advice = advice_on_loss(returned)
        if outputs is None and isinstance(returned, (tuple, list)) and len(returned) == 2:
            advice += " If these are (outputs, targets), loss= must be given to the optimizer."
        raise InputError(f"{where} must return the loss, a tensor with one entry, got {advice}")
    return returned.reshape(()), outputs, targets


def _may_write(loss: Callable[..., Tensor], outputs: Tensor) -> bool:
    """Say whether a loss may write past autograd's count into an ordinary tensor; torch's own write nowhere."""
    return type(outputs) is Tensor and not str(getattr(loss, "__module__", "")).startswith("torch.nn.")


def backward_of(
    closure: Callable[[], Any], params: Sequence[Tensor], loss: Callable[..., Tensor] | None
) -> tuple[Any, Tensor | None, Any]:
    """Run a closure, and backward() unless it did so itself; return (loss, outputs, targets), the loss detached.

    The gradient of a closure that calls no backward() replaces what lies in `.grad`. The latter two are None where
    they are not known.

    Raises:
        InputError: if the closure neither calls backward() nor returns a graph, or a graph without these parameters.
            A plain number is let through where there is no gradient but zero: nothing moves.
    """
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in params]
    trained = [p for p in params if p.requires_grad]
    reached: list[Tensor] = []  # by backward(); zero_grad(set_to_none=False) writes to gradients, too
    handles = [p.register_post_accumulate_grad_hook(reached.append) for p in trained]
    try:
        with torch.enable_grad():
            returned = closure()
    finally:
        for handle in handles:
            handle.remove()
    parts = returned if isinstance(returned, (tuple, list)) else (returned,)
    if reached or not trained or any(_is_new(p.grad, *seen) for p, seen in zip(params, before, strict=True)):
        return returned.detach() if isinstance(returned, Tensor) else returned, None, None
    if not any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        if isinstance(returned, (int, float)):
            if not any(_is_new(p.grad, None, None) for p in params):
                return returned, None, None  # as with torch's optimizers: no gradient, no step
        else:
            loss_of(returned, loss)
        raise InputError(
            "the closure called no backward() that reached the optimizer's parameters, and its loss has no graph: "
            "compute it from the parameters with gradients enabled, not under torch.no_grad() and not detached. "
            + UNREACHED
        )
    with torch.enable_grad():
        value, outputs, targets = loss_of(returned, loss)
        for p in params:
            p.grad = None
        try:
            value.backward()
        except RuntimeError as error:
            own = {id(p) for p in trained}
            if "a second time" in str(error) and not any(id(leaf) in own for leaf in leaves([value])):
                raise InputError(f"the loss does not depend on the optimizer's parameters. {UNREACHED}") from error
            raise
    return value.detach(), outputs, targets


def _is_new(grad: Tensor | None, before: Tensor | None, version: int | None) -> bool:
    """Return whether a closure wrote a gradient, other than zeros: a clearing is none."""
    if grad is None or (grad is before and grad._version == version):
        return False
    if is_part(grad):  # `fully_shard` passes the hooks of its parts by; all ranks take the same way from here
        return grad is not before or bool(grad.norm().full_tensor() != 0)
    return not all_zero([grad])


def residuals_of(returned: Any) -> Tensor:
    """Return the residuals as one tensor.

    Raises:
        InputError: for anything that is no residual: a loss, targets, integers.
    """
    parts = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    if not parts or not all(isinstance(r, Tensor) for r in parts) or sum(r.numel() for r in parts) == 0:
        raise InputError(
            f"the closure must return the residuals, a real tensor or several of them, got {_kind(returned)}."
        )
    if len(parts) == 1 and parts[0].ndim == 0:
        raise InputError(
            "the closure returned one number, a loss, where the residuals are asked for, whose squares are summed: "
            "half the square of a loss would be minimised. Return the residuals before squares and means, e.g. "
            "model(x) - y; for a loss that is no sum of squares use NewtonCG or TrustRegionNewton. One residual alone "
            "is returned as a tensor of shape (1,)."
        )
    for place, part in enumerate(parts):
        if not part.is_floating_point() or not part.requires_grad:
            what = "has no graph" if part.is_floating_point() else f"holds {part.dtype}"
            raise InputError(
                f"tensor {place + 1} of {len(parts)} that the closure returned {what}, so it is no residual: compute "
                "residuals from the parameters with gradients enabled, and not detached. Where (outputs, targets) "
                "were meant, return outputs - targets, or use NaturalGradient or NewtonCG with loss=."
            )
    return parts[0] if len(parts) == 1 else torch.cat([r.reshape(-1) for r in parts])


@contextlib.contextmanager
def own_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Keep what lies in `.grad` from a closure, which may zero it, and refuse one that adds to it.

    Raises:
        InputError: if the closure called backward(): its gradient would count twice.
    """
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
        if any(p.grad is not None and bool(p.grad.any()) for p in params):
            raise InputError(
                "the closure must return the loss and call no backward(): the optimizer differentiates it."
            )
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def _kind(returned: Any) -> str:
    return advice_on_loss(returned).partition(";")[0]
