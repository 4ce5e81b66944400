"""Functions of layers with backward passes of their own, cheaper at second order than those of autograd.

Each is differentiated twice, with the intermediate results that both passes share; a third derivative is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

__all__ = [
    "Activation",
    "ActivationBackward",
    "Attention",
    "AttentionBackward",
    "AveragePool",
    "Convolution",
    "ConvolutionBackward",
    "Normalise",
    "NormaliseBackward",
    "Relu",
    "last_derivative",
    "no_saved_tensor_hooks",
    "wanted",
]


def wanted(ctx: FunctionCtx, place: int) -> bool:
    """Whether the running backward pass needs the derivative in input `place` (and not merely could have it)."""
    node = ctx.next_functions[place][0]  # type: ignore[attr-defined]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that is differentiated for
        return True


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward pass of a first derivative: a graph of it is refused.

    `once_differentiable` alone puts an error into such a graph that the engine does not reach where it looks for
    parameters, so that a third derivative goes without this part of it.
    """
    marked = once_differentiable(backward)

    @functools.wraps(marked)
    def refusing(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("what is recorded here holds two derivatives: no graph of the second can be made.")
        return marked(ctx, *cotangents)

    return refusing


def no_saved_tensor_hooks() -> torch.autograd.graph.saved_tensors_hooks:
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
        b_bar = u.sum((0, *range(2, u.ndim))) if ctx.needs_input_grad[2] and wanted(ctx, 2) else None
        mask = (ctx.needs_input_grad[0] and wanted(ctx, 0), ctx.needs_input_grad[1] and wanted(ctx, 1))
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
    @last_derivative
    def backward(ctx: Any, x_dot: Tensor | None, w_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        u, x, w = ctx.saved_tensors
        u_bar = x_bar = w_bar = None
        if wanted(ctx, 0):  # the derivative of the convolution along (x_dot, w_dot)
            for a, b in ((x_dot, w), (x, w_dot)):
                if a is not None and b is not None:
                    term = torch.ops.aten.convolution(a, b, None, *ctx.geometry)
                    u_bar = term if u_bar is None else u_bar.add_(term)
        if w_dot is not None and wanted(ctx, 1):
            x_bar = _transposed(u, x, w_dot, ctx.geometry, (True, False))[0]
        if x_dot is not None and wanted(ctx, 2):
            w_bar = _transposed(u, x_dot, w, ctx.geometry, (False, True))[1]
        return u_bar, x_bar, w_bar, None, None


def _transposed(u: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...], mask: tuple[bool, bool]) -> tuple[Any, Any]:
    x_bar, w_bar, _ = torch.ops.aten.convolution_backward(u, x, w, None, *geometry, [*mask, False])
    return x_bar, w_bar


class Activation(Function):
    """y_i = f(x_i). Returns y and f'(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), torch._C.DisableTorchFunction(), no_saved_tensor_hooks():
            z = x.detach().requires_grad_()
            y = f(z)
            (d1,) = torch.autograd.grad(y, z, torch.ones_like(y), create_graph=True)
            (d2,) = torch.autograd.grad(d1, z, torch.ones_like(d1), allow_unused=True) if d1.requires_grad else (None,)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope := d1.detach(), torch.zeros_like(x) if d2 is None else d2)
        return y.detach(), slope

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, slope_bar: Tensor | None) -> tuple[Tensor | None, None]:
        slope, d2 = ctx.saved_tensors
        if torch.is_grad_enabled():
            return ActivationBackward.apply(u, slope), None
        x_bar = None if u is None else u * slope
        if slope_bar is not None:
            x_bar = slope_bar * d2 if x_bar is None else x_bar.addcmul_(slope_bar, d2)
        return x_bar, None


class ActivationBackward(Function):
    """(u, f'(x)) -> u f'(x)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(u, slope)
        return u * slope

    @staticmethod
    @last_derivative
    def backward(ctx: Any, x_dot: Tensor) -> tuple[Tensor | None, ...]:
        u, slope = ctx.saved_tensors
        return x_dot * slope if wanted(ctx, 0) else None, x_dot * u if wanted(ctx, 1) else None


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


class AveragePool(Function):
    """y = M'x for every row of windows, x the `rows` rows of an image that it covers, side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor, rows: int) -> Tensor:
        ctx.M, ctx.rows = M, rows
        return torch.matmul(x.reshape(*x.shape[:-2], x.shape[-2] // rows, len(M)), M)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None]:
        return AveragePoolBackward.apply(u, ctx.M, ctx.rows), None, None


class AveragePoolBackward(Function):
    """u -> M u, as an image. Either is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, M: Tensor, rows: int) -> Tensor:
        ctx.M, ctx.rows = M, rows
        return torch.matmul(u, M.T).reshape(*u.shape[:-2], u.shape[-2] * rows, len(M) // rows)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return AveragePool.apply(v, ctx.M, ctx.rows), None, None


class Normalise(Function):
    """y = w z + b, z = r (x - mean x), r = (var x + eps)^(-1/2), over the last dimensions; w, or b, may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, shape: tuple[int, ...], eps: float) -> Tensor:
        z, mean, r = torch.native_layer_norm(x, shape, None, None, eps)
        ctx.save_for_backward(x, w, b, z, mean, r)
        ctx.shape = shape
        if w is None:
            return z.clone()  # what is returned may be changed in place
        return z * w if b is None else torch.addcmul(b, z, w)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, z, mean, r = ctx.saved_tensors
        mask = [ctx.needs_input_grad[place] and wanted(ctx, place) for place in range(3)]
        if not torch.is_grad_enabled():
            return *torch.ops.aten.native_layer_norm_backward(u, x, ctx.shape, mean, r, w, b, mask), None, None
        return *NormaliseBackward.apply(u, x, w, b, z, mean, r, ctx.shape, mask), None, None


class NormaliseBackward(Function):
    """(u, x, w) -> (r P h, sum u z, sum u), h = w u, P = I - 11'/D - zz'/D; sums are over all but the last dimensions.

    The derivative of z along v is r P v, and that of the inner product <v, r P h> in x, at fixed v and h, is
    -(r^2 / D) (z (h' P v) + (v' z) P h + (h' z) P v).
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, *point: Any) -> Any:
        z, mean, r, shape, mask = point
        found = torch.ops.aten.native_layer_norm_backward(u, x, shape, mean, r, w, b, mask)
        h, dims = u if w is None else u * w, tuple(range(-len(shape), 0))
        D = math.prod(shape)
        bent = None if found[0] is None else found[0] * (-r / D)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x, w, z, mean, r, bent, -r / D, -r * (h * z).mean(dims, keepdim=True))
        ctx.shape = shape
        return found

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        u, x, w, z, mean, r, bent, of_z, of_z_dot = ctx.saved_tensors

        def rP(h: Tensor, scale: Tensor | None = None) -> Tensor:
            only_x = (True, False, False)
            return torch.ops.aten.native_layer_norm_backward(h, x, ctx.shape, mean, r, scale, None, only_x)[0]

        z_dot = None if v is None else rP(v)
        u_bar = x_bar = w_bar = None
        if wanted(ctx, 0):
            u_bar = z_dot if w is None else _plus_products(b_dot, (z, w_dot), (z_dot, w))
            u_bar = u_bar if u_bar is None else u_bar.expand_as(u)
        if w_dot is not None and wanted(ctx, 1):
            x_bar = rP(u, w_dot)
        if v is None or z_dot is None or not (wanted(ctx, 1) or wanted(ctx, 2)):
            return u_bar, x_bar, w_bar, *(None,) * 6
        uz_dot = (u * z_dot).flatten(-len(ctx.shape)).flatten(0, -2)
        if w is not None and wanted(ctx, 2):
            w_bar = uz_dot.sum(0).view_as(w)
        if wanted(ctx, 1):
            along_h = (uz_dot.sum(-1) if w is None else uz_dot @ w.flatten()).view_as(r)
            along_z = (v * z).flatten(-len(ctx.shape)).sum(-1).view_as(r)
            parts = (z * (along_h * of_z)).addcmul_(bent, along_z).addcmul_(z_dot, of_z_dot)
            x_bar = parts if x_bar is None else x_bar.add_(parts)
        return u_bar, x_bar, w_bar, *(None,) * 6


class Attention(Function):
    """O = P V, P = softmax(s Q K' + mask) by rows; q, k, v are (..., rows, columns). Returns O and P."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, s: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        sQ, K, V = _matrices(q * s), _matrices(k), _matrices(v)
        scores = torch.bmm(sQ, K.mT)
        if mask is not None:
            scores.view(*q.shape[:-1], -1).add_(mask)
        P = torch.softmax(scores, -1)
        if mask is not None:  # torch's attention is zero where nothing is to be attended to
            P = P.masked_fill_((scores == -math.inf).all(-1, keepdim=True), 0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sQ, s * K, V, P)
        ctx.s = s
        return torch.bmm(P, V).view(*q.shape[:-1], -1), P

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, R: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sQ, sK, V, P = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *AttentionBackward.apply(u, P, q, k, v, sQ, sK, V, ctx.s), None, None
        q_bar = k_bar = v_bar = None
        if u is not None:
            U = _matrices(u)
            if wanted(ctx, 2):
                v_bar = torch.bmm(P.mT, U).view(v.shape)
            R = torch.bmm(U, V.mT) if R is None else R.baddbmm_(U, V.mT)  # which nothing else holds
        if R is not None and (wanted(ctx, 0) or wanted(ctx, 1)):
            S_bar = torch._softmax_backward_data(R, P, -1, P.dtype)
            q_bar = torch.bmm(S_bar, sK).view(q.shape) if wanted(ctx, 0) else None
            k_bar = torch.bmm(S_bar.mT, sQ).view(k.shape) if wanted(ctx, 1) else None
        return q_bar, k_bar, v_bar, None, None


class AttentionBackward(Function):
    """(u, P, q, k, v) -> (s S K, s S' Q, P' u), with S = P (D - its mean under P), by entries, and D = u V'.

    Along (a, b, c) the scores move by E = s (a K' + Q b') and P by P_dot = P (E - its mean under P). The inner product
    of (a, b, c) with the result is <u, P_dot V + P c>; its derivative in P, with E held, is E D + u c', E and D less
    their means, up to what is constant in a row: the softmax that P comes from does not pass that on.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, P: Tensor, q: Tensor, k: Tensor, v: Tensor, *point: Any) -> Any:
        sQ, sK, V, s = point
        U = _matrices(u)
        D = torch.bmm(U, V.mT)
        S_bar = torch._softmax_backward_data(D, P, -1, P.dtype)
        D -= (P * D).sum(-1, keepdim=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(U, P, sQ, sK, V, D)
        ctx.s, ctx.shapes = s, (u.shape, q.shape, k.shape, v.shape)
        q_bar, k_bar = torch.bmm(S_bar, sK), torch.bmm(S_bar.mT, sQ)
        return q_bar.view(q.shape), k_bar.view(k.shape), torch.bmm(P.mT, U).view(v.shape)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        U, P, sQ, sK, V, D = ctx.saved_tensors
        A, B, C = (None if x is None else _matrices(x) for x in (a, b, c))
        E = None if A is None else torch.bmm(A, sK.mT)
        if B is not None:
            E = torch.bmm(sQ, B.mT) if E is None else E.baddbmm_(sQ, B.mT)
        u_bar = R = q_bar = k_bar = v_bar = None
        if C is not None:
            u_bar = torch.bmm(P, C) if wanted(ctx, 0) else None
            R = torch.bmm(U, C.mT) if wanted(ctx, 1) else None
        if E is not None:
            bent = wanted(ctx, 1)
            if bent:
                P_dot = P * E
                E -= P_dot.sum(-1, keepdim=True)
                torch.mul(P, E, out=P_dot)
            else:
                P_dot = torch._softmax_backward_data(E, P, -1, P.dtype)
            if wanted(ctx, 0):
                u_bar = torch.bmm(P_dot, V) if u_bar is None else u_bar.baddbmm_(P_dot, V)
            if wanted(ctx, 4):
                v_bar = torch.bmm(P_dot.mT, U)
            if bent:
                R = E.mul_(D) if R is None else R.addcmul_(E, D)
        of_q, of_k = wanted(ctx, 2), wanted(ctx, 3)
        if of_q or of_k:
            sS_bar = torch.addcmul(P.new_zeros(()), P, D, value=ctx.s)
            q_bar = torch.bmm(sS_bar, B) if B is not None and of_q else None
            k_bar = torch.bmm(sS_bar.mT, A) if A is not None and of_k else None
        found = zip((u_bar, q_bar, k_bar, v_bar), ctx.shapes, strict=True)
        u_bar, q_bar, k_bar, v_bar = (x if x is None else x.view(shape) for x, shape in found)
        return u_bar, R, q_bar, k_bar, v_bar, None, None, None, None


def _plus_products(b: Tensor | None, *factors: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Return b + sum x y by entries, in one pass a product; what is None counts as zero."""
    total = b
    for x, y in factors:
        if x is not None and y is not None:
            total = x * y if total is None else torch.addcmul(total, x, y) if total is b else total.addcmul_(x, y)
    return total


def _matrices(x: Tensor) -> Tensor:
    """Return (..., rows, columns) as (batch, rows, columns)."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
