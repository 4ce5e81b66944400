"""What is kept of the per-example gradients of a parameter, and the sums that need no gradient written out.

A linear map's gradient of example i is a sum over its rows t (tokens, places of an image) of outer products d_it a_it',
with squared norm sum_ts (d_it' d_is) (a_it' a_is); the weighted sum of its squares, where there is one row, is the
product of the squared factors. Each `Form` holds the gradients of one or several uses of a parameter.

Reference: Goodfellow (2015), Efficient per-example gradient computations; Dangel, Kunstner and Hennig (2020), BackPACK;
Li, Tramer, Liang and Hashimoto (2022), Large language models can be strong differentially private learners.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.per_example.probe import Probe

__all__ = ["Direct", "Factors", "Form", "Indexed", "Rows", "Scattered", "Squares", "Sum", "Windows", "merge"]

CACHE_BYTES = 2**22  # of temporaries on a CPU that are filled again and again: more leaves the caches


class Squares(NamedTuple):
    """Sums over entries of the gradients h_i of one parameter, or of several in a row."""

    total: Tensor | None  # (numel,), sum_i factors_i h_i^2; None unless asked for
    norms: Tensor  # (number of parameters, N), |h_i|^2 of each
    along: Tensor | None  # (N,), inner products with a vector; None unless asked for


class Form(ABC):
    """Gradients h_i, i < N, of one parameter, or of several in a row."""

    num_examples: int
    numels: tuple[int, ...]  # entries of each parameter
    route: str  # how they are held, as results report it

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some of the examples, (stop - start, numel)."""

    @abstractmethod
    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Return sum_i <h_i, probe> and the sum of the magnitudes of the terms it is made of, both ()."""

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        """Return sums of squares, a chunk at a time; None for factors (N,) or along (numel,) leaves theirs out."""
        total, norms, dots = None, [], []
        for start, stop in self.chunks(chunk_bytes):
            dense = self.dense(start, stop)
            norms.append(torch.stack([_squared_norms(part) for part in dense.split(self.numels, dim=1)]))
            if factors is not None:
                squares = factors[start:stop] @ dense.square()
                total = squares if total is None else total.add_(squares)
            if along is not None:
                dots.append(dense @ along)
        return Squares(total, torch.cat(norms, dim=1), torch.cat(dots) if along is not None else None)

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:
        """Return <h_i, vector> for a vector (numel,), (N,)."""
        return torch.cat([self.dense(*chunk) @ vector for chunk in self.chunks(chunk_bytes)])

    def chunks(self, chunk_bytes: int, width: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of as many examples as fit, at `width` entries each."""
        size = max(1, chunk_bytes // (8 * max(1, self.numel if width is None else width)))
        for start in range(0, self.num_examples, size):
            yield start, min(start + size, self.num_examples)


class Direct(Form):
    """Gradients as they are: of biases, of what normalisation layers scale by, of anything small."""

    route = "direct"

    def __init__(self, values: Tensor, numels: tuple[int, ...] | None = None, route: str = "direct") -> None:
        self.values, self.num_examples, self.route = values, len(values), route
        self.numels = (values.shape[1],) if numels is None else numels

    def dense(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        flat = probe.flat
        return self.values.mv(flat).sum(), self.values.abs().mv(flat.abs()).sum()

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        if factors is None and along is None and len(self.numels) == 1:
            return Squares(None, _squared_norms(self.values)[None], None)
        return super().squares(factors, chunk_bytes, along)


class Rows:
    """The right factor of a linear map: a, (N, G, T, p)."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, tuple(values.shape)

    def take(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:  # noqa: ARG002 - there already
        """Return the rows of some examples, (stop - start, G, T, p)."""
        return self.values[start:stop]

    def times(self, probe: Probe) -> Tensor:
        """Return a u for u the probe's right factor (p,), (N G T,)."""
        return self.values.reshape(-1, self.shape[3]).mv(probe.right)

    def map(self, matrices: Tensor) -> Tensor:
        """Return M a for matrices M (G, q, p), (N, G, T, q)."""
        if len(matrices) > 1:
            return self.values @ matrices.mT
        flat = self.values.reshape(-1, self.shape[-1]) @ matrices[0].mT  # one product instead of N
        return flat.view(*self.shape[:3], -1)


class Windows:
    """The right factor of a convolution: the windows of padded x (N, C, *sizes) that each output place sees.

    Kernel, stride, dilation and places (sizes of the output) have a number for each of the `sizes`; groups divide C.
    """

    def __init__(
        self,
        x: Tensor,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        places: tuple[int, ...],
    ) -> None:
        self.x, self.kernel, self.places = x.contiguous(), kernel, places
        self.geometry = (stride, dilation, groups)
        N, C = x.shape[:2]
        self.shape = (N, groups, torch.Size(places).numel(), C // groups * torch.Size(kernel).numel())

    def take(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return (stop - start, G, T, p), in the memory of `out` if given; a window's entries come as the kernel's."""
        stride, dilation, groups = self.geometry
        x = self.x[start:stop]
        N, C = x.shape[:2]
        steps = [s * e for s, e in zip(x.stride()[2:], stride, strict=True)]
        inner = [s * e for s, e in zip(x.stride()[2:], dilation, strict=True)]
        size = (N, groups, C // groups, *self.kernel, *self.places)  # places last: they lie next to each other in x
        strides = (x.stride(0), C // groups * x.stride(1), x.stride(1), *inner, *steps)
        windows = x.as_strided(size, strides, x.storage_offset())
        if out is not None:
            windows = out.view(-1)[: windows.numel()].view(size).copy_(windows)
        return windows.reshape(N, groups, self.shape[3], self.shape[2]).mT

    def times(self, probe: Probe) -> Tensor:
        """Return a u for u the probe's right factor (p,), (N G T,): channels are summed first, at a pass over x."""
        groups, (N, C) = self.geometry[2], self.x.shape[:2]
        plain = torch.matmul(probe.inner, self.x.view(N * groups, C // groups, -1))
        plain = plain.view(N * groups, 1, *self.x.shape[2:])
        return self._convolved(plain, probe.outer.view(1, 1, *self.kernel), 1).reshape(-1)

    def map(self, matrices: Tensor) -> Tensor:
        """Return M a for matrices M (G, q, p), (N, G, T, q): the convolution that these windows are of."""
        groups, N, C = self.geometry[2], *self.x.shape[:2]
        kernels = matrices.reshape(-1, C // groups, *self.kernel)
        return self._convolved(self.x, kernels, groups).view(N, groups, -1, self.shape[2]).mT

    def _convolved(self, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """Return (N, G, T) or, for more than one kernel a group, what can be seen as such."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        y = convolution(x, kernels.contiguous(), None, self.geometry[0], 0, self.geometry[1], groups)
        return y.reshape(self.x.shape[0], -1, self.shape[2])


class Factors(Form):
    """h_i = sum_t left_it right_it' in each of G groups, a (G q, p) matrix; left (N, G, T, q), right (N, G, T, p)."""

    def __init__(self, left: Tensor, right: Rows | Windows) -> None:
        self.left, self.right = left, right
        self.num_examples, self.groups, self.rows, self.q = left.shape
        self.p = right.shape[-1]
        self.numels = (self.groups * self.q * self.p,)

    @property
    def route(self) -> str:  # type: ignore[override]
        cheaper = self.rows * (self.p + self.q) <= max(self.p * self.q, self.p + self.q)
        return "ghost" if cheaper else "factorised"

    def dense(self, start: int, stop: int) -> Tensor:
        return (self.left[start:stop].mT @ self.right.take(start, stop)).reshape(stop - start, -1)

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        if self.groups == 1 and self.left.is_contiguous():
            on_left = self.left.view(-1, self.q).mv(probe.left)
        else:
            on_left = (probe.left.view(self.groups, 1, self.q) @ self.left.mT).flatten()
        return _sums(on_left.mul_(self.right.times(probe)))

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        if self.rows > 1 and (factors is not None or self.route != "ghost"):
            return self._written_out(factors, chunk_bytes, along)
        dots = None if along is None else self.along(along, chunk_bytes)
        if self.rows > 1:
            return Squares(None, self._ghost_norms(chunk_bytes), dots)
        d, a = self.left[:, :, 0], self.right.take(0, self.num_examples)[:, :, 0]
        if factors is None:
            return Squares(None, (_squared_norms(d) * _squared_norms(a)).sum(1)[None], dots)
        d, a = d.square(), a.square()
        norms = (d.sum(2) * a.sum(2)).sum(1)[None]
        total = (d.mul_(factors[:, None, None]).permute(1, 2, 0) @ a.transpose(0, 1)).reshape(-1)
        return Squares(total, norms, dots)

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:  # noqa: ARG002 - as large as the layer's output
        mapped = self.right.map(vector.view(self.groups, self.q, self.p))
        return (mapped.mT * self.left.mT).sum((1, 2, 3))

    def _written_out(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None) -> Squares:
        """Write gradients out a few at a time, into the same memory: new memory costs more than the sums."""
        G, T, p, q, left = self.groups, self.rows, self.p, self.q, self.left
        chunks = list(self.chunks(min(chunk_bytes, CACHE_BYTES) if left.device.type == "cpu" else chunk_bytes))
        size = chunks[0][1] if chunks else 0
        windows = left.new_empty(size * G * T * p) if isinstance(self.right, Windows) else None
        products = left.new_empty(size * G, q, p)
        norms = left.new_empty(self.num_examples)
        dots = None if along is None else left.new_empty(self.num_examples)
        total = None if factors is None else left.new_zeros(self.numel)
        for start, stop in chunks:
            a, d = self.right.take(start, stop, windows).flatten(0, 1), left[start:stop].flatten(0, 1)
            rows = torch.bmm(d.mT, a, out=products[: len(d)]).view(stop - start, -1)
            if along is not None and dots is not None:
                torch.mv(rows, along, out=dots[start:stop])
            torch.sum(rows.square_(), 1, out=norms[start:stop])
            if total is not None and factors is not None:
                total.addmv_(rows.T, factors[start:stop])
        return Squares(total, norms[None], dots)

    def _ghost_norms(self, chunk_bytes: int) -> Tensor:
        norms = []
        for start, stop in self.chunks(chunk_bytes, 2 * self.groups * self.rows**2 + self.groups * self.rows * self.p):
            a, d = self.right.take(start, stop), self.left[start:stop]
            norms.append(((d @ d.mT) * (a @ a.mT)).sum((1, 2, 3)))
        return torch.cat(norms)[None].clamp_min(0)  # terms of both signs: rounding may leave less than nothing

    def chunks(self, chunk_bytes: int, width: int | None = None) -> Iterator[tuple[int, int]]:
        return super().chunks(chunk_bytes, self.numel + self.groups * self.rows * self.p if width is None else width)

    def transposed(self) -> Factors | None:
        """Return the same for the transposed parameter; None if the right factor has to be written out for that."""
        if self.groups > 1 or isinstance(self.right, Windows):
            return None
        return Factors(self.right.values, Rows(self.left))


class Indexed(Form):
    """An embedding: row index_it of the (V, d) table receives values_it; what meets in a row adds up before squares."""

    route = "indexed"

    def __init__(self, index: Tensor, values: Tensor, num_rows: int) -> None:
        self.index, self.values, self.num_rows, self.num_examples = index, values, num_rows, len(index)
        self.numels = (num_rows * values.shape[-1],)

    def dense(self, start: int, stop: int) -> Tensor:
        values = self.values[start:stop]
        count, _, d = values.shape
        table = values.new_zeros(count * self.num_rows, d)
        table.index_add_(0, self._keys(self.index[start:stop]), values.reshape(-1, d))
        return table.view(count, -1)

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        return _sums((self.values @ probe.right) * probe.left[self.index])

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:  # noqa: ARG002 - as large as what is held
        return (self.values * vector.view(self.num_rows, -1)[self.index]).sum((1, 2))

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        d = self.values.shape[-1]
        dots = None if along is None else self.along(along, chunk_bytes)
        keys, places = self._keys(self.index).unique(return_inverse=True)
        met = self.values.new_zeros(len(keys), d).index_add_(0, places, self.values.reshape(-1, d)).square_()
        example, row = keys // self.num_rows, keys % self.num_rows
        norms = met.new_zeros(self.num_examples).index_add_(0, example, met.sum(1))
        if factors is None:
            return Squares(None, norms[None], dots)
        table = met.new_zeros(self.num_rows, d).index_add_(0, row, met * factors[example, None])
        return Squares(table.view(-1), norms[None], dots)

    def as_factors(self) -> Factors:
        """Return the same with one-hot rows for indices."""
        hot = F.one_hot(self.index, self.num_rows).to(self.values.dtype)
        return Factors(hot[:, None], Rows(self.values[:, None]))

    def _keys(self, index: Tensor) -> Tensor:
        return (index + self.num_rows * torch.arange(len(index), device=index.device)[:, None]).reshape(-1)


class Scattered(Form):
    """Gradients of a part of a parameter (a slice, an expanded row), put at its places `index` (inner.numel,)."""

    def __init__(self, inner: Form, index: Tensor, numel: int) -> None:
        self.inner, self.index = inner, index
        self.num_examples, self.numels = inner.num_examples, (numel,)
        self._injective = len(index.unique()) == len(index)
        self.route = inner.route

    def dense(self, start: int, stop: int) -> Tensor:
        inner = self.inner.dense(start, stop)
        return inner.new_zeros(len(inner), self.numel).index_add_(1, self.index, inner)

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        part = probe.flat[self.index]
        return _added(_sums(self.inner.dense(*chunk) * part) for chunk in self.inner.chunks(2**24))

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        if not self._injective:
            return super().squares(factors, chunk_bytes, along)
        total, norms, dots = self.inner.squares(factors, chunk_bytes, None if along is None else along[self.index])
        if total is not None:
            total = total.new_zeros(self.numel).index_add_(0, self.index, total)
        return Squares(total, norms, dots)

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:
        return self.inner.along(vector[self.index], chunk_bytes)


class Sum(Form):
    """Several uses of one parameter, whose gradients add up before anything is squared."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms = list(forms)
        self.num_examples, self.numels = forms[0].num_examples, forms[0].numels
        self.route = "factorised"

    def dense(self, start: int, stop: int) -> Tensor:
        return sum((form.dense(start, stop) for form in self.forms[1:]), self.forms[0].dense(start, stop))

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        return _added(form.project(probe) for form in self.forms)

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:
        return torch.stack([form.along(vector, chunk_bytes) for form in self.forms]).sum(0)

    def chunks(self, chunk_bytes: int, width: int | None = None) -> Iterator[tuple[int, int]]:
        return super().chunks(chunk_bytes // (1 + len(self.forms)), width)


def merge(forms: Sequence[Form], chunk_bytes: int) -> Form:
    """Return the gradients of a parameter from those of its uses."""
    if len(forms) == 1:
        return forms[0]
    if all(isinstance(form, Direct) for form in forms):
        return Direct(torch.stack([form.dense(0, form.num_examples) for form in forms]).sum(0))
    linear = [rows for form in forms if (rows := _as_rows(form, chunk_bytes)) is not None]
    if len(linear) == len(forms):
        left = torch.cat([form.left for form in linear], dim=2)
        merged = Factors(left, Rows(torch.cat([form.right.take(0, form.num_examples) for form in linear], dim=2)))
        if merged.route == "ghost" or not any(isinstance(form, Indexed) for form in forms):
            return merged
    return Sum(forms)


def _as_rows(form: Form, max_bytes: int) -> Factors | None:
    """Return factors that can be joined to others along their rows, if `form` has them."""
    if isinstance(form, Indexed) and 8 * form.index.numel() * form.num_rows <= max_bytes:
        return form.as_factors()
    return form if isinstance(form, Factors) and form.groups == 1 and isinstance(form.right, Rows) else None


def _squared_norms(x: Tensor) -> Tensor:
    """Return |x|^2 over the last dimension, without an array of squares."""
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _sums(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms.sum(), terms.abs().sum()  # a 1-norm takes five times as long


def _added(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    values, sizes = zip(*pairs, strict=True)
    return torch.stack(values).sum(), torch.stack(sizes).sum()
