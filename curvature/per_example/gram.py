"""Inner products of the gradients of all examples, collected batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.environment.cost import gibibytes
from curvature.errors import InputError
from curvature.per_example.forms import Factors, Form, Rows

__all__ = ["Gram"]

_DEAR = 4  # how many times the entries of a gradient T^2 (p + q) may be, to keep factors instead


class Gram:
    """G_ij = sum over parameters of g_i' g_j, from what each batch leaves behind.

    Gradients of linear maps are kept as their factors where these are smaller, all others as they are: the examples of
    different batches meet only at the end.

    Args:
        budget: bytes that may be kept.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._bytes = 0
        self._examples = 0
        self._kept: dict[int, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}

    def add(self, positions: Sequence[int], form: Form, scale: Tensor, places: Tensor) -> None:
        """Keep the gradients scale_i h_i of some parameters, of the examples with these numbers.

        Raises:
            InputError: if more would be kept than the budget allows.
        """
        self._examples = max(self._examples, int(places.max()) + 1)
        if _factors_are_smaller(form):
            assert isinstance(form, Factors)
            assert isinstance(form.right, Rows)
            self._reserve(form.left.numel() + form.right.values.numel(), scale)
            pieces = (form.left[:, 0] * scale[:, None, None], form.right.values[:, 0].clone())
            self._kept.setdefault(positions[0], []).append((places, pieces))
            return
        self._reserve(form.num_examples * form.numel, scale)
        rows = form.dense(0, form.num_examples) * scale[:, None]
        for position, part in zip(positions, rows.split(form.numels, dim=1), strict=True):
            self._kept.setdefault(position, []).append((places, (part,)))

    def matrix(self, num_examples: int, like: Tensor) -> Tensor:
        """Return G, (N, N), symmetric.

        Raises:
            InputError: if it does not fit into the budget with what is kept.
        """
        self._reserve(num_examples**2, like)
        G = like.new_zeros(num_examples, num_examples)
        for kept in self._kept.values():
            places = torch.cat([at for at, _ in kept])
            part = self._of_parameter([pieces for _, pieces in kept], like)
            G[places[:, None], places] += part
        return (G + G.T) / 2

    def _of_parameter(self, kept: list[tuple[Tensor, ...]], like: Tensor) -> Tensor:
        if any(len(pieces) == 1 for pieces in kept):  # batches of other shapes, other kinds
            rows = torch.cat([p[0] if len(p) == 1 else (p[0].mT @ p[1]).flatten(1) for p in kept])
            return rows @ rows.T
        length = max(left.shape[1] for left, _ in kept)
        left, right = (torch.cat([_padded(pieces[side], length) for pieces in kept]) for side in (0, 1))
        N = len(left)
        step = max(1, int(self._budget // 8 // max(1, 2 * N * length**2 * like.element_size())))
        strips = []
        for start in range(0, N, step):
            d, a = (x[start : start + step].flatten(0, 1) @ x.flatten(0, 1).T for x in (left, right))
            strips.append((d * a).view(-1, length, N, length).sum((1, 3)))
        return torch.cat(strips)

    def _reserve(self, entries: int, like: Tensor) -> None:
        self._bytes += entries * like.element_size()
        if self._bytes > self._budget:
            raise InputError(
                f"inner products of the gradients take {gibibytes(self._bytes)} for the first {self._examples} "
                f"examples and the budget is {gibibytes(self._budget)}; pass fewer examples or parameters, or "
                "memory_budget=."
            )


def _factors_are_smaller(form: Form) -> bool:
    if not isinstance(form, Factors) or form.groups > 1 or not isinstance(form.right, Rows):
        return False
    entries = form.rows * (form.p + form.q)
    return entries < form.numel and form.rows * entries <= _DEAR * form.numel


def _padded(x: Tensor, length: int) -> Tensor:
    """Return (N, T, p) with rows of zeros up to T = length."""
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1]))
