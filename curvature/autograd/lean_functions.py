"""Functions of layers with backward passes of their own, cheaper at second order than those of autograd.

Each is differentiated twice, with the intermediate results that both passes share; a third derivative is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

__all__ = [
    "Activation",
    "ActivationBackward",
    "Convolution",
    "ConvolutionBackward",
    "Normalise",
    "NormaliseBackward",
    "Relu",
]


def _wanted(ctx: FunctionCtx, place: int) -> bool:
    """Whether the running backward pass needs the derivative in input `place` (and not merely could have it)."""
    node = ctx.next_functions[place][0]  # type: ignore[attr-defined]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that is differentiated for
        return True


def _no_saved_tensor_hooks() -> torch.autograd.graph.saved_tensors_hooks:
    """Keep activation checkpointing, which works by such hooks, out of a computation within one function."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class Convolution(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        b_bar = u.sum((0, *range(2, u.ndim))) if ctx.needs_input_grad[2] and _wanted(ctx, 2) else None
        mask = (ctx.needs_input_grad[0] and _wanted(ctx, 0), ctx.needs_input_grad[1] and _wanted(ctx, 1))
        if not any(mask):
            return None, None, b_bar, None
        if not torch.is_grad_enabled():
            return *_transposed(u, x, w, ctx.geometry, mask), b_bar, None
        return *ConvolutionBackward.apply(u, x, w, ctx.geometry, mask), b_bar, None


class ConvolutionBackward(Function):
    """(u, x, w) -> (x_bar, w_bar), bilinear: x_bar = D(u, w), w_bar = W(u, x), with C(x, w) the convolution itself."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...], mask: tuple[bool, bool]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x, w)
        ctx.geometry = geometry
        return _transposed(u, x, w, geometry, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_dot: Tensor | None, w_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        u, x, w = ctx.saved_tensors
        u_bar = x_bar = w_bar = None
        if _wanted(ctx, 0):  # the derivative of the convolution along (x_dot, w_dot)
            for a, b in ((x_dot, w), (x, w_dot)):
                if a is not None and b is not None:
                    term = torch.ops.aten.convolution(a, b, None, *ctx.geometry)
                    u_bar = term if u_bar is None else u_bar.add_(term)
        if w_dot is not None and _wanted(ctx, 1):
            x_bar = _transposed(u, x, w_dot, ctx.geometry, (True, False))[0]
        if x_dot is not None and _wanted(ctx, 2):
            w_bar = _transposed(u, x_dot, w, ctx.geometry, (False, True))[1]
        return u_bar, x_bar, w_bar, None, None


def _transposed(u: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...], mask: tuple[bool, bool]) -> tuple[Any, Any]:
    x_bar, w_bar, _ = torch.ops.aten.convolution_backward(u, x, w, None, *geometry, [*mask, False])
    return x_bar, w_bar


class Activation(Function):
    """y_i = f(x_i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad(), torch._C.DisableTorchFunction(), _no_saved_tensor_hooks():
            z = x.detach().requires_grad_()
            y = f(z)
            (d1,) = torch.autograd.grad(y, z, torch.ones_like(y), create_graph=True)
            (d2,) = torch.autograd.grad(d1, z, torch.ones_like(d1), allow_unused=True) if d1.requires_grad else (None,)
        ctx.save_for_backward(x, d1.detach(), torch.zeros_like(x) if d2 is None else d2)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:
        x, d1, d2 = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return u * d1, None
        return ActivationBackward.apply(u, x, d1, d2), None


class ActivationBackward(Function):
    """(u, x) -> u f'(x)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
        ctx.save_for_backward(d1, u * d2)
        return u * d1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_dot: Tensor) -> tuple[Tensor | None, ...]:
        d1, ud2 = ctx.saved_tensors
        return x_dot * d1 if _wanted(ctx, 0) else None, x_dot * ud2 if _wanted(ctx, 1) else None, None, None


class Relu(Function):
    """y_i = max(x_i, 0). Autograd fills a tensor with its second derivative, zero, and adds it to others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(u, y.detach(), 0)


class Normalise(Function):
    """z = r (x - mean x), r = (var x + eps)^(-1/2), over the last `ndim` dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ndim: int, eps: float) -> Tensor:
        z, _, r = torch.native_layer_norm(x, x.shape[-ndim:], None, None, eps)
        ctx.save_for_backward(x, z, r)
        ctx.ndim = ndim
        return z

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None]:
        x, z, r = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _normalise_backward(h, z, r, tuple(range(-ctx.ndim, 0)))[0], None, None
        return NormaliseBackward.apply(h, x, z.detach(), r, ctx.ndim), None, None


def _normalise_backward(h: Tensor, z: Tensor, r: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return r P h, P h and the mean of h z."""
    hz = (h * z).mean(dims, keepdim=True)
    Ph = (h - h.mean(dims, keepdim=True)).addcmul_(z, hz, value=-1)
    return r * Ph, Ph, hz


class NormaliseBackward(Function):
    """(h, x) -> r P h, with P = I - 11'/D - zz'/D.

    The derivative of z along v is r P v, and that of the inner product <v, r P h> in x, at fixed v and h, is
    -(r^2 / D) (z (h' P v) + (v' z) P h + (h' z) P v).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, z: Tensor, r: Tensor, ndim: int) -> Tensor:
        dims = tuple(range(-ndim, 0))
        rPh, Ph, hz = _normalise_backward(h, z, r, dims)
        ctx.save_for_backward(z, r, Ph, hz)
        ctx.dims = dims
        return rPh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        z, r, Ph, hz = ctx.saved_tensors
        vz = (v * z).mean(ctx.dims, keepdim=True)
        Pv = (v - v.mean(ctx.dims, keepdim=True)).addcmul_(z, vz, value=-1)
        h_bar = r * Pv if _wanted(ctx, 0) else None
        x_bar = None
        if _wanted(ctx, 1):
            hPv = (Ph * v).mean(ctx.dims, keepdim=True)
            x_bar = (z * hPv).addcmul_(Ph, vz).addcmul_(Pv, hz).mul_(-r * r)
        return h_bar, x_bar, None, None, None
