"""The layers whose per-example gradients are known from what goes into them and the gradient that comes back.

A rule takes a call of one of torch's functions and says, for each tensor that may be a parameter, how that tensor's
per-example gradients follow from d, the gradient in the call's output, and from where the examples lie in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.per_example.forms import Direct, Factors, Form, Indexed, Rows, Windows
from curvature.per_example.layout import Build, Examples, Layout

__all__ = ["RULES", "Claim"]


class Claim(NamedTuple):
    """A tensor that a call uses as a parameter, if it is one."""

    tensor: Any
    build: Build
    """May read the call's inputs: autograd keeps them, too, and raises where they are overwritten."""


def _per_channel(terms: Tensor, ex: Examples) -> Form | None:
    """Return sums over all but examples and channels of terms (N k, C, ...)."""
    grouped = None if ex.layout is Layout.SECOND else ex.arranged(terms)
    return None if grouped is None else Direct(grouped.sum((1, *range(3, grouped.ndim))))


def _reduced(terms: Tensor, shape: Sequence[int], ex: Examples) -> Form | None:
    """Return `terms`, of a broadcast result, summed to an operand of this shape that examples share."""
    grouped = ex.arranged(terms)
    padded = [*(1,) * (terms.ndim - len(shape)), *shape]
    if grouped is None or (ex.repeated and padded[0] != ex.count):
        return None
    if ex.repeated:
        padded[0] = 1
    if ex.layout is Layout.SECOND:
        padded[:2] = padded[1::-1]
    else:
        padded.insert(1, 1)
    if padded[0] != 1:
        return None
    over = [i for i, size in enumerate(padded) if i > 0 and size == 1 and grouped.shape[i] != 1]
    return Direct((grouped.sum(over) if over else grouped).reshape(ex.count, -1))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Claim]:
    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        left, right = ex.rows(d), ex.rows(input.to(d.dtype))
        return None if left is None or right is None else Factors(left, Rows(right))

    return [Claim(weight, of_weight), Claim(bias, _last_dimension)]


def _last_dimension(d: Tensor, ex: Examples) -> Form | None:
    rows = ex.rows(d)
    if rows is None:
        return None
    return Direct(rows.sum((1, 2)) if rows.shape[2] > 1 else rows[:, 0, 0])


def _matmul(input: Tensor, mat2: Tensor) -> list[Claim]:
    """Products x @ W with W (p, q): the transpose of a linear map's weight."""

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        left, right = ex.rows(input.to(d.dtype)), ex.rows(d)
        return None if left is None or right is None else Factors(left, Rows(right))

    return [Claim(mat2, of_weight)] if mat2.ndim == 2 and input.ndim >= 2 else []


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> list[Claim]:
    if (alpha, beta) != (1, 1):
        return []
    return [*_matmul(mat1, mat2), Claim(input, lambda d, ex: _reduced(d, input.shape, ex))]


def _convolution(spatial: int) -> Callable[..., list[Claim]]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> list[Claim]:
        kernel = tuple(weight.shape[2:])
        steps, spread = _tuple(stride, spatial), _tuple(dilation, spatial)
        if isinstance(padding, str):
            total = [0 if padding == "valid" else s * (k - 1) for s, k in zip(spread, kernel, strict=True)]
            sides = [(n // 2, n - n // 2) for n in total]
        else:
            sides = [(n, n) for n in _tuple(padding, spatial)]

        @functools.lru_cache(1)
        def windows(dtype: torch.dtype, places: tuple[int, ...]) -> Windows:
            padded = F.pad(input.to(dtype), [n for side in reversed(sides) for n in side])
            return Windows(padded, kernel, steps, spread, groups, places)

        def of_weight(d: Tensor, ex: Examples) -> Form | None:
            N = ex.count
            if input.ndim != spatial + 2 or input.shape[0] != N or ex.layout is Layout.SECOND:
                return None  # images that are pieces of an example would need their windows regrouped
            left = d.reshape(N, groups, d.shape[1] // groups, -1).mT
            return Factors(left, windows(d.dtype, tuple(d.shape[2:])))

        return [Claim(weight, of_weight), Claim(bias, _per_channel)]

    return rule


def _transposed_convolution(spatial: int) -> Callable[..., list[Claim]]:
    """The adjoint of a convolution: input and gradient in the output change places."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> list[Claim]:
        steps, sides, spread = (_tuple(value, spatial) for value in (stride, padding, dilation))

        def of_weight(d: Tensor, ex: Examples) -> Form | None:
            N = ex.count
            if input.ndim != spatial + 2 or input.shape[0] != N or ex.layout is Layout.SECOND:
                return None
            padded = F.pad(d, [n for side in reversed(sides) for n in (side, side)])
            windows = Windows(padded, tuple(weight.shape[2:]), steps, spread, groups, tuple(input.shape[2:]))
            return Factors(input.to(d.dtype).reshape(N, groups, input.shape[1] // groups, -1).mT, windows)

        return [Claim(weight, of_weight), Claim(bias, _per_channel)]

    return rule


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Claim]:
    if max_norm is not None or sparse:
        return []  # the table is rewritten, or gradients are no dense tensors

    def of_table(d: Tensor, ex: Examples) -> Form | None:
        index, values = ex.arranged(input), ex.arranged(d)
        if index is None or values is None or input.numel() == 0:
            return None
        index, values = index.reshape(ex.count, -1), values.reshape(ex.count, -1, d.shape[-1])
        if padding_idx is not None:
            values = values * (index != padding_idx % weight.shape[0])[..., None]
        return Indexed(index, values, weight.shape[0])

    return [Claim(weight, of_table)]


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> list[Claim]:
    shape = tuple(normalized_shape)

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        return _reduced(d * F.layer_norm(input.to(d.dtype), normalized_shape, None, None, eps), shape, ex)

    return [Claim(weight, of_weight), Claim(bias, lambda d, ex: _reduced(d, shape, ex))]


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> list[Claim]:
    eps = torch.finfo(input.dtype).eps if eps is None else eps  # torch's default, which is the input's own

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        return _reduced(d * F.rms_norm(input.to(d.dtype), normalized_shape, None, eps), tuple(normalized_shape), ex)

    return [Claim(weight, of_weight)]


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> list[Claim]:
    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        return _per_channel(d * F.group_norm(input.to(d.dtype), num_groups, None, None, eps), ex)

    return [Claim(weight, of_weight), Claim(bias, _per_channel)]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Claim]:
    if training or running_mean is None or running_var is None:
        return []
    mean, var = running_mean.detach().clone(), running_var.detach().clone()

    @functools.lru_cache(1)
    def centred(dtype: torch.dtype) -> Tensor:
        return input.to(dtype) - mean.to(dtype).view(-1, *(1,) * (input.ndim - 2))

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        x = centred(d.dtype)
        terms = x * d if d.ndim == 2 else torch.linalg.vecdot(x.flatten(2), d.flatten(2))
        form = _per_channel(terms, ex)
        return None if form is None else Direct(form.dense(0, ex.count) * torch.rsqrt(var.to(d.dtype) + eps))

    return [Claim(weight, of_weight), Claim(bias, _per_channel)]


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Claim]:
    mean, var = (None if use_input_stats or t is None else t.detach().clone() for t in (running_mean, running_var))

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        m, v = (None if t is None else t.to(d.dtype) for t in (mean, var))
        return _per_channel(d * F.instance_norm(input.to(d.dtype), m, v, None, None, use_input_stats, 0.1, eps), ex)

    return [Claim(weight, of_weight), Claim(bias, _per_channel)]


def _add(input: Any, other: Any, *, alpha: float = 1) -> list[Claim]:
    """Sums x + p, p alike for all examples: a table of positions, a bias that a module adds by itself."""
    claims = [(input, 1), (other, alpha)]
    return [Claim(t, _scaled_reduction(t, f)) for t, f in claims if isinstance(t, Tensor)]


def _scaled_reduction(operand: Tensor, factor: float) -> Build:
    shape = tuple(operand.shape)
    return lambda d, ex: _reduced(d if factor == 1 else factor * d, shape, ex)


def _mul(input: Any, other: Any) -> list[Claim]:
    """Products x * p, p alike for all examples: gains that a module keeps by itself."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return []

    def of(operand: Tensor, partner: Tensor) -> Claim:
        return Claim(operand, lambda d, ex: _reduced(d * partner, operand.shape, ex))

    return [of(input, other), of(other, input)]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> list[Claim]:
    """Concatenations of what examples share, repeated for each, with what they do not: class tokens."""
    claims, start = [], 0
    for t in tensors:
        claims.append(Claim(t, _of_slice(dim, start, t)))
        start += t.shape[dim]
    return claims if dim % max(1, tensors[0].ndim) > 0 else []


def _of_slice(dim: int, start: int, operand: Tensor) -> Build:
    length, shape = operand.shape[dim], tuple(operand.shape)
    return lambda d, ex: _reduced(d.narrow(dim, start, length), shape, ex)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * length if len(values) == 1 else values


RULES: dict[Any, Callable[..., list[Claim]]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    torch.addmm: _addmm,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.add_), _add),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.multiply), _mul),
}
