"""Squares of the gradients of examples, summed over many vectors in the outputs: what columns share is handled once."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.per_example.forms import CACHE_BYTES, Direct, Factors, Form, Rows, Windows

__all__ = ["ColumnSquares"]


class ColumnSquares:
    """sum_v sum_i s_vi h_vi^2 of one parameter, h_vi the part of example i for column v.

    Where examples have one row, d_vi a_i' for a linear map, squares of the d_vi are summed first and multiplied by
    those of the a_i at the end. Where they have many, the gradients of several columns are written out with right
    factors (windows of a convolution) that are formed once for them: for as many as a cache holds, on a CPU, since new
    memory for more costs more than windows that are formed again.

    Args:
        total: (numel,), where the sum is added.
        chunk_bytes: size of temporary tensors.
    """

    def __init__(self, total: Tensor, chunk_bytes: int) -> None:
        self._total, self._chunk_bytes = total, chunk_bytes
        self._held_bytes = min(chunk_bytes, 2 * CACHE_BYTES) if total.device.type == "cpu" else chunk_bytes
        self._squares: Tensor | None = None  # (N, G, q) of a linear map, (N, numel) of what is held as it is
        self._right: Rows | Windows | None = None
        self._lefts: list[Tensor] = []
        self._sign = 0.0

    def add(self, form: Form, sign: float | Tensor) -> None:
        """Add a column's gradients, with one sign or (N,) of them."""
        if isinstance(form, Direct) and form.values.nbytes <= self._chunk_bytes:
            self._accumulate(form.values, None, sign)
        elif isinstance(form, Factors) and form.rows == 1 and isinstance(form.right, Rows):
            self._accumulate(form.left[:, :, 0], form.right, sign)
        elif isinstance(form, Factors) and isinstance(sign, float):
            if not (self._lefts and sign == self._sign and _same(self._right, form.right)):
                self.flush()
            self._lefts.append(form.left)
            self._right, self._sign = form.right, sign
            if (1 + len(self._lefts)) * form.left.nbytes > self._held_bytes:
                self.flush()
        else:
            ones = self._total.new_ones(form.num_examples)
            squared = form.squares(ones * sign, self._chunk_bytes).total
            assert squared is not None
            self._total.add_(squared)

    def flush(self) -> None:
        """Add to the total what is still apart."""
        if self._squares is not None:
            squares, right, self._squares = self._squares, self._right, None
            if isinstance(right, Rows):
                a = right.values[:, :, 0].square()
                self._total.add_((squares.permute(1, 2, 0) @ a.transpose(0, 1)).reshape(-1))
            else:
                self._total.add_(squares.sum(0))
        if self._lefts:
            self._write_out()
            self._lefts = []

    def _write_out(self) -> None:
        """Add the squares of gradients that are written out for a few examples at a time, into the same memory."""
        left, right = self._lefts[0], self._right
        assert right is not None
        G, T, q, p = *left.shape[1:], right.shape[-1]
        limit = min(self._chunk_bytes, CACHE_BYTES) if left.device.type == "cpu" else self._chunk_bytes
        chunks = list(Factors(left, right).chunks(limit))
        size = chunks[0][1] if chunks else 0
        windows = left.new_empty(size * G * T * p) if isinstance(right, Windows) else None
        products, signs = left.new_empty(size * G, q, p), left.new_full((size,), self._sign)
        for start, stop in chunks:
            a = right.take(start, stop, windows).flatten(0, 1)
            for left in self._lefts:
                d = left[start:stop].flatten(0, 1)
                rows = torch.bmm(d.mT, a, out=products[: len(d)]).view(stop - start, -1)
                self._total.addmv_(rows.square_().T, signs[: stop - start])

    def _accumulate(self, values: Tensor, right: Rows | None, sign: float | Tensor) -> None:
        if self._squares is None or not _same(self._right, right):
            self.flush()
        if isinstance(sign, Tensor):
            term, factor = values * sign.view(-1, *[1] * (values.ndim - 1)), 1.0
        else:
            term, factor = values, sign
        if self._squares is None:
            self._squares, self._right = torch.zeros_like(values, memory_format=torch.contiguous_format), right
        self._squares.addcmul_(values, term, value=factor)


def _same(a: Rows | Windows | None, b: Rows | Windows | None) -> bool:
    if isinstance(a, Rows) and isinstance(b, Rows):
        return a.values.data_ptr() == b.values.data_ptr() and a.shape == b.shape
    return a is b
