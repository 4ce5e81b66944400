"""What lies in `.grad`: adding to it as a backward pass would, and the checks before it is used."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.objective.shards import is_part

__all__ = [
    "UNREACHED",
    "Followed",
    "Seen",
    "add_to_grad",
    "all_zero",
    "local",
    "poison",
    "refuse_gradients",
    "refuse_non_finite",
    "refuse_sparse",
]

UNREACHED = (
    "After model.load_state_dict(..., assign=True), model.to_empty(...) or a replaced layer the model holds other "
    "parameters than the optimizer: build the optimizer anew, then load its state."
)


def add_to_grad(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Add to `.grad` as a backward pass would: no graph, and no memory shared between two gradients."""
    taken: set[int] = set()
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        g = g.detach()
        strided = g.layout == torch.strided
        if p.grad is not None:
            p.grad = p.grad.add_(g) if strided and p.grad.layout == torch.strided else p.grad + g
        elif strided and (g.stride() != p.stride() or g.data_ptr() in taken):
            p.grad = torch.empty_like(p).copy_(g)
        else:
            p.grad = g
            if strided:
                taken.add(g.data_ptr())


def local(tensor: Any, like: Any = None) -> Tensor:
    """Return this rank's part of a tensor, placed as another one; a whole tensor as it is."""
    if not is_part(tensor):
        return tensor
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()


def refuse_sparse(grads: Iterable[Tensor | None], optimizer: str) -> None:
    """Refuse sparse gradients.

    Raises:
        InputError: if there is one.
    """
    if any(g is not None and g.layout != torch.strided for g in grads):
        raise InputError(f"{optimizer} does not support sparse gradients; build the embedding with sparse=False.")


def all_zero(grads: Iterable[Tensor]) -> bool:
    """Return whether no gradient has an entry other than zero. Waits for the device."""
    return not any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in grads)


class _Sight:
    """A gradient as it was seen, without keeping it alive."""

    def __init__(self, g: Tensor) -> None:
        self._id, self._ref, self._version = id(g), weakref.ref(g), local(g)._version

    def is_now(self, g: Tensor) -> bool:
        # the reference is followed only where it leads to g: other tensors may live on in autograd alone
        return self._id == id(g) and self._ref() is g and self._version == local(g)._version


class Seen:
    """The gradients that lay in `.grad` at some time."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._sights = [None if p.grad is None else _Sight(p.grad) for p in params]

    def all_still(self, params: Sequence[Tensor]) -> bool:
        """Return whether there are gradients, and each lay there then, unchanged: no backward pass came in between."""
        now = [p.grad for p in params]
        if len(now) != len(self._sights) or all(g is None for g in now):
            return False
        return all(g is None or (s is not None and s.is_now(g)) for g, s in zip(now, self._sights, strict=True))


class Followed:
    """The gradients that belong to what was measured beside them, to tell later whether somebody cleared them.

    Only None and zeros are a clearing, not a gradient that was scaled or replaced. A backward pass fills what was None,
    so hooks look at what lies there before each pass; without them, where the step comes at once, any change is one.
    """

    def __init__(self) -> None:
        self._sights: dict[int, _Sight] = {}
        self._empty: dict[int, bool] = {}  # whether there was no gradient when a backward pass last came by
        self._cleared: set[int] = set()  # followed, and gone before a backward pass brought the next
        self._handles: list[Any] = []
        self._to_come = False

    def take(self, params: Iterable[Tensor], *, to_come: bool = False, looks: bool = True) -> None:
        """Follow the gradients that lie in `.grad`, or those that backward passes bring from here on."""
        params = list(params)
        if to_come:
            self._to_come = True
        else:
            found = {id(p): _Sight(p.grad) for p in params if p.grad is not None}
            self._sights |= found
            self._cleared -= found.keys()
        if looks and not self._handles:
            self._handles = [p.register_hook(lambda _, p=p: self._before(p)) for p in params]
            self._handles += [p.register_post_accumulate_grad_hook(self._after) for p in params]

    def _before(self, p: Tensor) -> None:
        self._empty[id(p)] = p.grad is None

    def _after(self, p: Tensor) -> None:
        if id(p) not in self._sights:
            if self._to_come:
                self.take([p])
        elif self._empty.get(id(p)):
            self._cleared.add(id(p))

    def cleared(self, params: Iterable[Tensor]) -> bool:
        """Return whether all that were followed are gone or zero. Waits for the device if all changed."""
        followed = [p for p in params if id(p) in self._sights]
        kept = [p for p in followed if p.grad is not None and id(p) not in self._cleared]
        if not followed or any(self._sights[id(p)].is_now(p.grad) for p in kept if p.grad is not None):
            return False
        return not self._handles or all_zero(local(p.grad) for p in kept if p.grad is not None)

    def end(self) -> None:
        """Follow nothing from here on."""
        while self._handles:
            self._handles.pop().remove()
        self._sights, self._empty, self._cleared, self._to_come = {}, {}, set(), False


def poison(params: Iterable[Tensor], curvatures: Sequence[Sequence[Tensor]]) -> None:
    """Make a gradient NaN where curvature is not finite, so that whoever looks for infinities there finds one."""
    norms = [n for tensors in curvatures for n in torch._foreach_norm(list(tensors))]
    for p in params:
        if norms and p.grad is not None and p.grad.numel() > 0:
            p.grad.add_(torch.stack([n.to(p.device, torch.float32) for n in norms]).sum() * 0)
            return


def refuse_non_finite(params: Sequence[Tensor], curvatures: Sequence[Tensor]) -> None:
    """Refuse curvature that is not finite. Waits for the device once.

    Raises:
        NonFiniteError: with the shape of the first parameter concerned.
    """
    filled = [h for h in curvatures if h.numel() > 0]
    if not filled:
        return
    norms = list(torch._foreach_norm(filled))  # half the time of a largest entry; its squares may overflow
    if any(n.device.type != "cpu" for n in norms):
        if len({(n.device, n.dtype) for n in norms}) > 1:
            norms = [n.to(norms[0].device, torch.float64) for n in norms]
        norms = [torch.stack(norms).amax()]  # one wait
    if all(math.isfinite(n.item()) for n in norms):
        return
    shapes = [tuple(p.shape) for p, h in zip(params, curvatures, strict=True) if not bool(h.isfinite().all())]
    if not shapes:
        return
    raise NonFiniteError(
        f"the curvature of {len(shapes)} parameters, the first of shape {shapes[0]}, is not finite: the loss is not "
        "twice differentiable there (sqrt or norm at 0?) or overflows. Shift the argument, use a wider dtype, or pass "
        "check_finite=False."
    )


def refuse_gradients(params: list[Tensor], optimizer: str) -> None:
    """Refuse gradients that are not finite. Waits for the device once.

    Raises:
        NonFiniteError: with the shape of the first one.
    """
    parts = [p.grad.to_local() if is_part(p.grad) else p.grad for p in params if p.grad is not None]  # type: ignore[attr-defined]
    filled = [g for g in parts if g.numel() > 0]
    norms = list(torch._foreach_norm(filled)) if filled else []
    if not norms or bool(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).sum().isfinite()):
        return
    wrong = [tuple(g.shape) for g in filled if not bool(g.isfinite().all())]
    if wrong:
        raise NonFiniteError(
            f"{len(wrong)} gradients, the first of shape {wrong[0]}, are not finite: {optimizer} would average them "
            "for good. Nothing has moved. Skip the batch (a GradScaler does), lower lr, or pass check_finite=False."
        )
