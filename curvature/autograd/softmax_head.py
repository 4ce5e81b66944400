"""The last linear layer of a classifier and its cross-entropy, walked in blocks of rows.

With h (N, d) what goes into the layer, W (V, d) and b (V,) its parameters, logits z = f(h W' + b) with f(a) = s a or
c tanh(s a / c), and targets y, the loss of row n is

    l_n = A_n log sum_k exp z_nk - sum_k t_nk z_nk,    t_nk = w_k ((1 - e) [k = y_n] + e / V),    A_n = sum_k t_nk

with class weights w and label smoothing e. Logits, their softmax and all that has their shape (N, V) exist for one
block of rows at a time; between calls only h, W, b and the (N,) logarithms are kept, and the softmax of some rows of a
wide layer. The price is that logits are computed again by each derivative: five matrix products for one with the
Gauss-Newton matrix in place of four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import Function

from curvature.autograd.lean_functions import last_derivative

__all__ = ["BLOCK_BYTES", "Core", "Parts", "SoftmaxHead"]

BLOCK_BYTES = 16 << 20
"""Of one (rows, V) buffer at d <= 192; wider layers take up to four times as much, which keeps their products fast."""
NARROW = 192
SOFTMAX_BYTES = 4 * BLOCK_BYTES
"""Of the softmax that is held for the products with one matrix, where the layer is wide."""

Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Something for each of h, W and b; None stands for zero, or for what is not asked for."""
Core: TypeAlias = Callable[[slice, Tensor, Tensor], Tensor]
"""(rows, softmax, change of logits) -> change of the gradient in the logits, all (rows, V); may overwrite both."""


@dataclass(frozen=True)
class SoftmaxHead:
    """Rows that count, the layer behind them and the targets they are compared with."""

    h: Tensor
    W: Tensor
    b: Tensor | None
    y: Tensor
    """(N,), class indices."""
    weight: Tensor | None = None
    """Class weights (V,)."""
    smoothing: float = 0.0
    scale: float = 1.0
    cap: float | None = None

    # -- losses and targets -------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matrix products, which are in the dtype of h."""
        return torch.promote_types(self.h.dtype, torch.float32)

    @property
    def term_weights(self) -> Tensor:
        """What a mean over the rows divides by the sum of, (N,)."""
        ones = torch.ones(len(self.y), dtype=self.dtype, device=self.h.device)
        return ones if self.weight is None else self.weight.to(self.h.device, self.dtype)[self.y]

    @property
    def masses(self) -> Tensor:
        """A_n, (N,)."""
        mean = 1.0 if self.weight is None else self.weight.to(self.h.device, self.dtype).mean()
        return (1 - self.smoothing) * self.term_weights + self.smoothing * mean

    def losses(self) -> Tensor:
        """Return l_n, (N,), with as many derivatives as `RowLosses` has."""
        result: Tensor = RowLosses.apply(self.h, self.W, self.b, self)
        return result

    def rows(self) -> Iterator[slice]:
        """Yield the blocks."""
        d, V = self.W.shape[1], self.W.shape[0]
        room = BLOCK_BYTES * min(max(d / NARROW, 1.0), 4.0)
        step = max(16, int(room / (V * self.dtype.itemsize)))
        for start in range(0, len(self.y), step):
            yield slice(start, min(start + step, len(self.y)))

    def room_for_softmax(self) -> Tensor:
        """Return room for the softmax of leading blocks of a wide layer: held, it saves them a product of five."""
        row, held = len(self.W) * self.dtype.itemsize, 0
        if self.W.shape[1] > NARROW and self.cap is None:
            held = max((rows.stop for rows in self.rows() if rows.stop * row <= SOFTMAX_BYTES), default=0)
        return torch.empty(held, len(self.W), dtype=self.dtype, device=self.h.device)

    def subtract_targets(self, values: Tensor, rows: slice, sizes: Tensor) -> Tensor:
        """Return values - sizes t over a block, written into the values; sizes are (rows,)."""
        hard = -(1 - self.smoothing) * self.term_weights[rows] * sizes
        values.scatter_add_(1, self.y[rows, None], hard[:, None].to(values.dtype))
        if self.smoothing:
            w = values.new_ones(len(self.W)) if self.weight is None else self.weight.to(values)
            values.addr_(sizes.to(values.dtype), w, alpha=-self.smoothing / len(self.W))
        return values

    def target_sums(self, values: Tensor, rows: slice) -> Tensor:
        """Return sum_k t_nk values_nk over a block, (rows,)."""
        total = (1 - self.smoothing) * self.term_weights[rows] * values.gather(1, self.y[rows, None])[:, 0]
        if self.smoothing:
            w = values.new_ones(len(self.W)) if self.weight is None else self.weight.to(values)
            total += self.smoothing / len(self.W) * (values @ w)
        return total

    # -- sums over blocks ---------------------------------------------------------------------------------------------

    def log_sums_and_losses(self, softmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log sum_k exp z_nk and l_n, both (N,), and write the softmax of the rows there is room for."""
        work = Workspace(self)
        log_sums, of_targets = (torch.empty(len(self.y), dtype=self.dtype, device=self.h.device) for _ in range(2))
        for rows in self.rows():
            z, _ = work.logits(rows)
            of_targets[rows] = self.target_sums(z, rows)
            largest = z.amax(1)
            total = z.sub_(largest[:, None]).exp_().sum(1)
            log_sums[rows] = largest + total.log()
            if softmax is not None and rows.stop <= len(softmax):
                torch.div(z, total[:, None], out=softmax[rows])
        return log_sums, self.masses * log_sums - of_targets

    def gradient(self, u: Tensor, log_sums: Tensor, needed: tuple[bool, bool, bool]) -> Parts:
        """Return the gradient of sum_n u_n l_n in h, W and b."""
        work = Workspace(self, needed)
        for rows, q in self.logit_gradients(u, log_sums, work):
            work.add(rows, q)
        return work.results()

    def logit_gradients(
        self, u: Tensor, log_sums: Tensor, work: Workspace | None = None, blocks: Iterable[slice] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradient of sum_n u_n l_n in a = h W' + b, a block at a time, in memory that the next overwrites.

        Blocks are those of `rows`, or others that are no longer.
        """
        work, masses = work or Workspace(self), self.masses
        for rows in self.rows() if blocks is None else blocks:
            z, y = work.logits(rows)
            g = z.sub_(log_sums[rows, None]).exp_().mul_((masses * u)[rows, None])
            yield rows, work.times_slope(self.subtract_targets(g, rows, u[rows]), y)

    def hessian(
        self, u: Tensor, log_sums: Tensor, along: Parts, needed: tuple[bool, bool, bool], with_slopes: bool
    ) -> tuple[Tensor | None, Parts]:
        """Return d l_n along (x, Y, beta) if asked for, and the gradient of sum_n u_n d l_n in h, W and b."""
        work, masses = Workspace(self, needed), self.masses
        slopes = torch.empty_like(u) if with_slopes else None
        for rows in self.rows():
            z, y = work.logits(rows)
            p = z.sub_(log_sums[rows, None]).exp_()
            da = work.change(rows, along)
            bent = None if y is None else da * (1 - y * y).mul_(y).mul_(-2 * self.scale**2 / (self.cap or 1.0))
            dz = work.times_slope(da, y)
            mean = torch.linalg.vecdot(p, dz)
            if slopes is not None:
                slopes[rows] = masses[rows] * mean - self.target_sums(dz, rows)
            if not any(needed):
                continue
            sizes = u[rows] * masses[rows]
            q = work.times_slope(dz.sub_(mean[:, None]).mul_(p).mul_(sizes[:, None]), y)
            g = self.subtract_targets(p.mul_(sizes[:, None]), rows, u[rows])
            if bent is not None:
                q.add_(bent.mul_(g))
            work.add(rows, q)
            work.add_bilinear(rows, work.times_slope(g, y), along)
        return slopes, work.results()

    def curved(
        self, core: Core, log_sums: Tensor, softmax: Tensor, along: Parts, needed: tuple[bool, bool, bool]
    ) -> Parts:
        """Return Z'M Z (x, Y, beta), Z the Jacobian of the logits in h, W and b, and M on each row what `core` says."""
        work = Workspace(self, needed)
        for rows in self.rows():
            if rows.stop <= len(softmax):
                p, y = work.copy(softmax[rows]), None
            else:
                z, y = work.logits(rows)
                p = z.sub_(log_sums[rows, None]).exp_()
            work.add(rows, work.times_slope(core(rows, p, work.times_slope(work.change(rows, along), y)), y))
        return work.results()

    # -- matrices on the logits ---------------------------------------------------------------------------------------

    def loss_hessian(self, sizes: Tensor) -> Core:
        """Return M = sizes_n A_n (diag p - p p')."""
        sizes = sizes * self.masses

        def core(rows: slice, p: Tensor, dz: Tensor) -> Tensor:
            return dz.sub_(torch.linalg.vecdot(p, dz)[:, None]).mul_(p).mul_(sizes[rows, None])

        return core

    def sampled_fisher(self, sizes: Tensor, drawn: Tensor) -> Core:
        """Return M = sizes_n A_n times the mean of (e_k - p)(e_k - p)' over the classes drawn, (N, S)."""
        sizes = sizes * self.masses

        def core(rows: slice, p: Tensor, dz: Tensor) -> Tensor:
            k, of_p = drawn[rows], torch.linalg.vecdot(p, dz)[:, None]
            gaps = (dz.gather(1, k) - of_p) * (sizes[rows, None] / k.shape[1])
            return p.mul_(-gaps.sum(1, keepdim=True)).scatter_add_(1, k, gaps)

        return core

    def outer_products(self, sizes: Tensor) -> Core:
        """Return M = sizes_n g_n g_n', g_n = A_n p_n - t_n the gradient of l_n in the logits."""
        masses = self.masses

        def core(rows: slice, p: Tensor, dz: Tensor) -> Tensor:
            g = self.subtract_targets(p.mul_(masses[rows, None]), rows, torch.ones_like(masses[rows]))
            return g.mul_((sizes[rows] * torch.linalg.vecdot(g, dz))[:, None])

        return core

    def draw(self, log_sums: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Return classes (N, S) drawn from the softmax of each row; they do not depend on how rows are cut."""
        work = Workspace(self)
        shape, device = (len(self.y), num_samples), self.h.device
        levels = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        drawn = torch.empty(shape, dtype=torch.int64, device=device)
        for rows in self.rows():
            z, _ = work.logits(rows)
            for one in range(rows.start, rows.stop):  # in float64: a row at a time keeps that small
                total = z[one - rows.start].sub(log_sums[one]).double().exp_().cumsum_(0)
                drawn[one] = torch.searchsorted(total, levels[one] * total[-1], right=True)
        return drawn.clamp_(max=len(self.W) - 1)


class Workspace:
    """Buffers of one walk over the blocks of a head, and the sums that it adds up."""

    def __init__(self, head: SoftmaxHead, needed: tuple[bool, bool, bool] = (False, False, False)) -> None:
        self._head = head
        self._buffers: dict[str, Tensor] = {}
        shapes = (head.h.shape, head.W.shape, head.W.shape[:1])
        sums = (head.h.new_zeros(s, dtype=head.dtype) if n else None for s, n in zip(shapes, needed, strict=True))
        self._of_h, self._of_W, self._of_b = sums

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return z, and tanh(s a / c) where logits are capped."""
        head = self._head
        h = head.h[rows]
        a = self._wide("logits", torch.mm(h, head.W.T, out=self._buffer("logits", h)))
        if head.b is not None:
            a += head.b
        if head.cap is None:
            return (a if head.scale == 1 else a.mul_(head.scale)), None
        y = a.mul_(head.scale / head.cap).tanh_()
        return y * head.cap, y

    def copy(self, softmax: Tensor) -> Tensor:
        """Return a copy that may be overwritten."""
        name = "logits" if softmax.dtype == self._head.h.dtype else "wide logits"
        return self._buffer(name, softmax, softmax.dtype).copy_(softmax)

    def change(self, rows: slice, along: Parts) -> Tensor:
        """Return x W' + h Y' + beta of a block."""
        head, (x, Y, beta) = self._head, along
        h = head.h[rows]
        out = self._buffer("change", h)
        out = out.zero_() if x is None else torch.mm(x[rows], head.W.T, out=out)
        if Y is not None:
            out.addmm_(h, Y.T)
        if beta is not None:
            out += beta
        return self._wide("change", out)

    def times_slope(self, values: Tensor, y: Tensor | None) -> Tensor:
        """Return f'(a) values, written into the values."""
        scale = self._head.scale
        if y is None:
            return values if scale == 1 else values.mul_(scale)
        return values.mul_((1 - y * y).mul_(scale))

    def add(self, rows: slice, q: Tensor) -> None:
        """Add what a change q of the gradient in a = h W' + b contributes."""
        if self._of_b is not None:
            self._of_b += q.sum(0)
        self._add(rows, q, self._head.W, self._head.h)

    def add_bilinear(self, rows: slice, g: Tensor, along: Parts) -> None:
        """Add what the change of the factors h and W contributes, g the gradient in a."""
        x, Y, _ = along
        self._add(rows, g, Y, x)

    def _add(self, rows: slice, q: Tensor, W: Tensor | None, h: Tensor | None) -> None:
        q = q.to(self._head.h.dtype)
        if self._of_h is not None and W is not None:
            _add_product(self._of_h[rows], q, W)
        if self._of_W is not None and h is not None:
            _add_product(self._of_W, q.T, h[rows])

    def results(self) -> Parts:
        """Return the sums, in the dtype of h."""
        sums = (self._of_h, self._of_W, self._of_b)
        of_h, of_W, of_b = (None if s is None else s.to(self._head.h.dtype) for s in sums)
        return of_h, of_W, of_b

    def _buffer(self, name: str, h: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._buffers:
            size = max((rows.stop - rows.start for rows in self._head.rows()), default=0) * len(self._head.W)
            self._buffers[name] = h.new_empty(size, dtype=dtype)
        shape = (len(h), len(self._head.W))
        return self._buffers[name][: shape[0] * shape[1]].view(shape)

    def _wide(self, name: str, values: Tensor) -> Tensor:
        if values.dtype == self._head.dtype:
            return values
        return self._buffer(f"wide {name}", values, self._head.dtype).copy_(values)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:  # sums over blocks are kept in float32
        out += a @ b


def _needed(ctx: Any, first: int) -> tuple[bool, bool, bool]:
    h, W, b = ctx.needs_input_grad[first : first + 3]
    return h, W, b


class RowLosses(Function):
    """(h, W, b) -> l (N,); two derivatives."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, b: Tensor | None, head: SoftmaxHead) -> Tensor:
        ctx.settings = _settings(head)
        log_sums, losses = head.log_sums_and_losses()
        ctx.save_for_backward(h, W, b, head.y, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        h, W, b, y, log_sums = ctx.saved_tensors
        return *RowGradients.apply(u, h, W, b, y, log_sums, ctx.settings, _needed(ctx, 0)), None


class RowGradients(Function):
    """(u, h, W, b) -> the gradient of sum_n u_n l_n in h, W and b; one derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        h: Tensor,
        W: Tensor,
        b: Tensor | None,
        y: Tensor,
        log_sums: Tensor,
        settings: Mapping[str, Any],
        needed: tuple[bool, bool, bool],
    ) -> Parts:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(u, h, W, b, y, log_sums)
        return SoftmaxHead(h, W, b, y, **settings).gradient(u, log_sums, needed)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *along: Any) -> tuple[Any, ...]:
        u, h, W, b, y, log_sums = ctx.saved_tensors
        head = SoftmaxHead(h, W, b, y, **ctx.settings)
        slopes, parts = head.hessian(u, log_sums, along, _needed(ctx, 1), ctx.needs_input_grad[0])
        return slopes, *parts, None, None, None, None


def _settings(head: SoftmaxHead) -> dict[str, Any]:
    return {"weight": head.weight, "smoothing": head.smoothing, "scale": head.scale, "cap": head.cap}
