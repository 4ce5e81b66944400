"""Batch normalisation by statistics of the batch, with its second derivative in closed form.

Autograd writes that out in some 35 passes over the input, two fifths of a Hessian product of a small convolutional
network; here it takes eight, and the fused kernel of torch's own backward pass. It has no third derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from curvature.autograd.lean_functions import last_derivative, no_saved_tensor_hooks, wanted

__all__ = ["BatchNorm", "BatchNormBackward", "agrees_with_autograd"]


class BatchNorm(Function):
    """y = w z + b, z = r (x - m), with m and r = (var x + eps)^(-1/2) those of each channel over the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, m, r = torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, w, m, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        x, w, m, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *BatchNormBackward.apply(u, x, w, m, r, ctx.eps), *(None,) * 4
        return *_pulled_back(u, x, w, m, r, ctx.eps), *(None,) * 4


class BatchNormBackward(Function):
    """(u, x, w) -> (w r P u, sum u z, sum u): what a backward pass adds to x, w and b; P = I - 11'/D - zz'/D.

    With cotangents v, p and q of the three and sums and means over the D places of a channel, the derivative is

        in u    w r P v + p z + q
        in w    sum (u r P v)
        in x    (p - r w mean(v z)) r P u - r w mean(u z) r P v - r w mean(u r P v) z
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, w: Tensor, m: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
        rPu, uz, total = _pulled_back(u, x, None, m, r, eps)
        ctx.save_for_backward(u, x, w, m, r, rPu, uz)
        ctx.eps = eps
        return rPu * _by_channel(w, x), uz, total

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        u, x, w, m, r, rPu, uz = ctx.saved_tensors
        rPv, vz, _ = _pulled_back(v, x, None, m, r, ctx.eps)
        u_bar = x_bar = w_bar = None
        if wanted(ctx, 0):
            u_bar = _affine(x, p * r, q - p * r * m).addcmul_(rPv, _by_channel(w, x))
        if wanted(ctx, 1) or wanted(ctx, 2):
            w_bar = (u * rPv).sum((0, *range(2, x.ndim)))
        if wanted(ctx, 1):
            share = r * w * (x.shape[1] / x.numel())
            slope = -share * r * w_bar
            x_bar = _affine(x, slope, -slope * m)
            x_bar.addcmul_(rPu, _by_channel(p - share * vz, x)).addcmul_(rPv, _by_channel(-share * uz, x))
        return u_bar, x_bar, w_bar, None, None, None


def _pulled_back(u: Tensor, x: Tensor, w: Tensor | None, m: Tensor, r: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return w r P u, sum u z and sum u, w = 1 where it is None."""
    mask = [True, True, True]
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(u, x, w, None, None, m, r, True, eps, mask)
    return found


def _affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(_by_channel(offset, x), x, _by_channel(slope, x))


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 2))


def agrees_with_autograd(x: Tensor, w: Tensor, b: Tensor, eps: float) -> bool:
    """Compare output, gradients and second derivatives with autograd's at these inputs and random cotangents."""
    generator = torch.Generator(x.device).manual_seed(0)
    u, *cotangents = (torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in (x, x, w, b))
    found = []
    with torch.enable_grad(), torch._C.DisableTorchFunction(), no_saved_tensor_hooks():
        for closed in (True, False):
            x_, w_, b_, u_ = (t.detach().requires_grad_() for t in (x, w, b, u))
            if closed:
                y = BatchNorm.apply(x_, w_, b_, None, None, 0.0, eps)
            else:
                y = torch.batch_norm(x_, w_, b_, None, None, True, 0.0, eps, False)
            first = torch.autograd.grad(y, [x_, w_, b_], u_, create_graph=True)
            second = torch.autograd.grad(first, [x_, w_, u_], cotangents)
            found.append([t.detach() for t in (y, *first, *second)])
    allowed = max(1e-5, 10 * torch.finfo(x.dtype).eps ** 0.5)
    return all(bool((a - b).norm() <= allowed * b.norm()) for a, b in zip(*found, strict=True))  # not on NaN
