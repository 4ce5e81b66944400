"""Logits that are not computed before the loss says what it wants of them.

`HeadInBlocks` watches a forward pass and its loss. Where the weight of the head meets its input, it returns a
`LazyLogits`, which has the shape of the logits and no memory, and follows what is done to it: slices and reshapes of
rows, casts, factors, a soft cap, a bias of classes. A cross-entropy ends it in `SoftmaxHead`, which works in blocks of
rows. Whatever else happens to it raises `NotInBlocksError`, and the model is run again with logits as torch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from curvature.autograd.softmax_head import BLOCK_BYTES, SoftmaxHead
from curvature.errors import CheckFailedError

__all__ = ["SMALL_LOGITS", "HeadInBlocks", "LazyLogits", "NotInBlocksError"]

SMALL_LOGITS = 4 * BLOCK_BYTES
"""Logits of no more bytes are computed as ever: kept, they save two matrix products of six."""

_FACTS = {"dim", "size", "numel", "ndimension", "is_floating_point", "is_complex", "__len__", "__hash__", "stride"}
_REQUIRES_GRAD, _GRAD_FN = (vars(torch._C.TensorBase)[name].__get__ for name in ("requires_grad", "grad_fn"))
_SAME = {"contiguous", "clone"}
_CASTS = {"float": torch.float32, "double": torch.float64}


class NotInBlocksError(CheckFailedError):
    """Something was done to logits that they cannot follow without being computed."""


class LazyLogits(Tensor):
    """Logits f(h W' + b) (..., V) of rows h (..., d), f a product of factors with at most one tanh among them."""

    h: Tensor
    W: Tensor
    b: Tensor | None
    factors: tuple[float, ...]
    """(s,) for f(a) = s a, (s, c) for c tanh(s a)."""
    varies: tuple[bool, bool, bool]
    """Which of h, W and b depend on the parameters; detached logits remember it."""

    @staticmethod
    def __new__(
        cls,
        h: Tensor,
        W: Tensor,
        b: Tensor | None,
        factors: tuple[float, ...] = (1.0,),
        dtype: torch.dtype | None = None,
        varies: tuple[bool, bool, bool] | None = None,
    ) -> LazyLogits:
        made = Tensor._make_wrapper_subclass(
            cls, (*h.shape[:-1], len(W)), dtype=dtype or h.dtype, device=h.device, requires_grad=False
        )
        made.h, made.W, made.b, made.factors = h, W, b, factors
        made.varies = varies or (h.requires_grad, W.requires_grad, b is not None and b.requires_grad)
        return made

    def like(self, **changes: Any) -> LazyLogits:
        """Return the same logits but for some of what they are made of."""
        made = {"h": self.h, "W": self.W, "b": self.b, "factors": self.factors, "dtype": self.dtype}
        return LazyLogits(**made | changes)

    @property
    def roots(self) -> list[Tensor]:
        """What a derivative of the logits goes through: those of h, W and b that vary.

        A parameter is a view among them, for a graph has other tensors as its ends than as its beginnings.
        """
        parts = (self.h.flatten(0, -2), self.W, self.b)
        return [p.view_as(p) for p, varies in zip(parts, self.varies, strict=True) if varies and p is not None]

    def head(self, y: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> SoftmaxHead:
        """Return them beside targets (N,)."""
        scale, *cap = self.factors
        of = {"scale": scale * cap[0], "cap": cap[0]} if cap else {"scale": scale}
        return SoftmaxHead(self.h.flatten(0, -2), self.W, self.b, y, weight, label_smoothing, **of)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == _REQUIRES_GRAD:
            return any(args[0].varies)
        if func == _GRAD_FN:
            return args[0].h.grad_fn
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        logits = args[0] if args else None
        follows = torch.is_grad_enabled() or name == "detach"  # else the result would be a constant
        if follows and isinstance(logits, LazyLogits) and not any(isinstance(a, LazyLogits) for a in args[1:]):
            found = _followed(func, name, logits, args[1:], kwargs or {})
            if found is not None:
                return found
        raise NotInBlocksError(f"the head's logits go through {resolve_name(func) or name}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override] # as torch's guide has it
        raise NotInBlocksError(f"the head's logits go through {func}")


class HeadInBlocks(TorchFunctionMode):
    """While active, products with the weight of a head are lazy where they are large.

    Attributes:
        in_use: whether one was.
        refusal: what happened to them that they cannot follow; "" if nothing did.

    Args:
        weight: of the head.
        least: bytes of logits (in float32) from which on they are lazy.
    """

    def __init__(self, weight: Tensor, least: int | None = None) -> None:
        super().__init__()
        self.in_use, self.refusal = False, ""
        self._weight, self._least = weight, SMALL_LOGITS if least is None else least
        self._versions: list[tuple[Tensor, int]] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if any(t._version != version for t, version in self._versions):
            self.refusal = "what the head's logits are made of was changed in place behind them"

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and args[1] is self._weight and self._large(args[0]):
            self.in_use = True
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self._versions += [(t, t._version) for t in (args[0], args[1], bias) if t is not None]
            return LazyLogits(args[0], args[1], bias)
        try:
            if any(isinstance(arg, LazyLogits) for arg in args):
                return LazyLogits.__torch_function__(func, types, args, kwargs)
            return func(*args, **kwargs)
        except NotInBlocksError as error:
            self.refusal = str(error)
            raise

    def _large(self, h: Tensor) -> bool:
        if (
            not torch.is_grad_enabled()
            or type(h) is not Tensor
            or not h.is_floating_point()
            or torch.is_autocast_enabled(h.device.type)
        ):
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            return False
        return h.ndim > 1 and h.shape[:-1].numel() * len(self._weight) * 4 > self._least


# -- what logits follow: (logits, other arguments, keywords) -> lazy logits, or None where they cannot -----------------


def _followed(func: Any, name: str, logits: LazyLogits, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func is F.cross_entropy:
        return _cross_entropy(logits, *rest, **kwargs)
    if name in _CASTS and not rest and not kwargs:
        return logits.like(dtype=_CASTS[name])
    rule = _RULES.get(name)
    if rule is not None and not kwargs:
        return rule(logits, *rest)
    if name in _SAME or name == "detach":
        return logits if name in _SAME else _detached(logits)
    return None


def _detached(logits: LazyLogits) -> LazyLogits:
    b = None if logits.b is None else logits.b.detach()
    return logits.like(h=logits.h.detach().flatten(0, -2), W=logits.W.detach(), b=b, varies=logits.varies)


def _times(logits: LazyLogits, factor: Any) -> LazyLogits | None:
    number = _number(factor)
    return None if number is None else logits.like(factors=(*logits.factors[:-1], logits.factors[-1] * number))


def _over(logits: LazyLogits, factor: Any) -> LazyLogits | None:
    number = _number(factor)
    return None if not number else _times(logits, 1 / number)


def _tanh(logits: LazyLogits) -> LazyLogits | None:
    return logits.like(factors=(*logits.factors, 1.0)) if len(logits.factors) == 1 else None


def _plus(logits: LazyLogits, bias: Any) -> LazyLogits | None:
    """A bias of classes, before any factor."""
    if not isinstance(bias, Tensor) or bias.numel() != logits.shape[-1] or bias.shape[-1:] != logits.shape[-1:]:
        return None
    if logits.factors != (1.0,) or bias.ndim > logits.ndim or bias.dtype != logits.h.dtype:
        return None
    return logits.like(b=bias.reshape(-1) if logits.b is None else logits.b + bias.reshape(-1))


def _reshape(logits: LazyLogits, *shape: Any) -> LazyLogits | None:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    classes = logits.shape[-1]
    if len(sizes) < 2 or sizes[-1] not in (classes, -1):
        return None
    if sizes[-1] == -1 and torch.Size(sizes[:-1]).numel() * classes != logits.numel():
        return None
    return logits.like(h=logits.h.reshape(*sizes[:-1], logits.h.shape[-1]))


def _flatten(logits: LazyLogits, start: int = 0, end: int = -1) -> LazyLogits | None:
    last = end % logits.ndim
    return logits.like(h=logits.h.flatten(start % logits.ndim, last)) if last < logits.ndim - 1 else None


def _item(logits: LazyLogits, index: Any) -> LazyLogits | None:
    """Rows, by slices and numbers; and leading classes, where a vocabulary is padded."""
    places = list(index) if isinstance(index, tuple) else [index]
    if sum(place is Ellipsis for place in places if not isinstance(place, Tensor)) == 1:
        k = next(i for i, place in enumerate(places) if place is Ellipsis)
        places[k : k + 1] = [slice(None)] * (logits.ndim - len(places) + 1)
    if not all(isinstance(place, (slice, int)) for place in places) or len(places) > logits.ndim:
        return None
    classes = slice(None)
    if len(places) == logits.ndim:
        if not isinstance(places[-1], slice):
            return None
        classes = places.pop()
    rows = logits.h[tuple(places)]
    if rows.ndim < 2:
        return None
    if classes.indices(len(logits.W)) == (0, len(logits.W), 1):
        return logits.like(h=rows)
    return logits.like(h=rows, W=logits.W[classes], b=None if logits.b is None else logits.b[classes])


def _to(logits: LazyLogits, *kinds: Any) -> LazyLogits | None:
    dtypes = [kind for kind in kinds if isinstance(kind, torch.dtype)]
    others = [kind for kind in kinds if not isinstance(kind, torch.dtype)]
    here = all(isinstance(kind, (str, torch.device)) and torch.device(kind) == logits.device for kind in others)
    real = all(dtype.is_floating_point for dtype in dtypes)
    return logits.like(dtype=dtypes[0] if dtypes else logits.dtype) if here and real and len(dtypes) < 2 else None


def _cross_entropy(
    logits: LazyLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Rows that are ignored are left out before the layer."""
    if not isinstance(target, Tensor) or target.is_floating_point() or logits.ndim != 2 or target.ndim != 1:
        return None
    if size_average is not None or reduce is not None or len(target) != len(logits):
        return None
    counted = (target != ignore_index).nonzero()[:, 0]  # by place: a mask makes derivatives wait for a GPU
    y = target[counted]
    if bool(((y < 0) | (y >= logits.shape[1])).any()):
        return None  # torch says which
    head = logits.like(h=logits.h.index_select(0, counted)).head(y, weight, label_smoothing)
    losses = head.losses()
    if reduction == "mean":
        return (losses.sum() / head.term_weights.sum()).to(logits.dtype)
    if reduction == "sum":
        return losses.sum().to(logits.dtype)
    return losses.new_zeros(len(target)).index_copy(0, counted, losses).to(logits.dtype)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.ndim == 0 and not value.requires_grad else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


_RULES: dict[str, Callable[..., LazyLogits | None]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _times),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _over),
    **dict.fromkeys(("add", "__add__", "__radd__"), _plus),
    **dict.fromkeys(("view", "reshape"), _reshape),
    "tanh": _tanh,
    "flatten": _flatten,
    "__getitem__": _item,
    "to": _to,
}
