"""The gradients of the last linear layer by example, where its logits are never whole.

Gradients of all else follow from that in the rows h that go into the layer. Those of its weight, sum_t q_it h_it' with
q_it the gradient in the logits of row t of example i, are never all there: norms of examples whose rows fit into a
block are sums of products over pairs of rows, and other gradients are written out one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from curvature.autograd.lazy_logits import LazyLogits
from curvature.autograd.softmax_head import SoftmaxHead
from curvature.losses.rules import CrossEntropy, LossRule
from curvature.per_example.forms import Form, Squares
from curvature.per_example.probe import Probe

__all__ = ["HeadRows", "head_forms", "serves"]


def serves(logits: LazyLogits, rule: LossRule | None, params: Sequence[Tensor]) -> bool:
    """Say whether the layer is one whose gradients are known here: its weight and bias are parameters or constants."""
    own = {id(p) for p in params}
    parts = [part for part in (logits.W, logits.b) if part is not None]
    known = all(id(part) in own or not part.requires_grad for part in parts)
    return known and logits.h.requires_grad and isinstance(rule, CrossEntropy)


def head_forms(
    logits: LazyLogits, rule: CrossEntropy, targets: Tensor, num_examples: int, params: Sequence[Tensor]
) -> dict[int, Form]:
    """Return the gradients of the layer's weight and bias, by their place among the parameters.

    Args:
        logits: whose rows are the examples', one after another.
        rule: the loss.
        targets: a class for each row.
        num_examples: N.
        params: of the objective.
    """
    counted = (targets != rule.settings.get("ignore_index", -100)).nonzero()[:, 0]
    b = None if logits.b is None else logits.b.detach()
    rows = logits.like(h=logits.h.detach().flatten(0, -2).index_select(0, counted), W=logits.W.detach(), b=b)
    head = rows.head(targets[counted], rule.settings.get("weight"), rule.settings.get("label_smoothing", 0.0))
    log_sums, _ = head.log_sums_and_losses()
    scale = 1.0 if rule.reduction == "sum" else 1.0 / rule.num_terms(None, targets)
    firsts = torch.arange(num_examples + 1, device=counted.device) * (len(targets) // num_examples)
    bounds = torch.searchsorted(counted, firsts).tolist()
    places = {id(p): i for i, p in enumerate(params)}
    parts = ((logits.W, False), (logits.b, True))
    return {
        places[id(part)]: HeadRows(head, log_sums, scale, bounds, of_bias=of_bias)
        for part, of_bias in parts
        if part is not None and id(part) in places
    }


class HeadRows(Form):
    """h_i = scale times the sum of dl_t / dW, or dl_t / db, over rows t from bounds[i] to bounds[i + 1]."""

    route = "in blocks"

    def __init__(
        self, head: SoftmaxHead, log_sums: Tensor, scale: float, bounds: Sequence[int], *, of_bias: bool
    ) -> None:
        self._head, self._of_bias, self._bounds = head, of_bias, bounds
        self.h, self.log_sums = head.h, log_sums  # seen by what counts what is held
        self._sizes = torch.full_like(log_sums, scale)
        self.num_examples = len(bounds) - 1
        self.numels = (len(head.W) if of_bias else head.W.numel(),)

    def dense(self, start: int, stop: int) -> Tensor:
        out = self.log_sums.new_empty(stop - start, self.numel)
        for row, i in zip(out, range(start, stop), strict=True):
            row.copy_(self._one(i))
        return out

    def _one(self, i: int) -> Tensor:
        rows = self._rows(i, i + 1)
        head = replace(self._head, h=self._head.h[rows], y=self._head.y[rows])
        parts = head.gradient(self._sizes[rows], self.log_sums[rows], (False, not self._of_bias, self._of_bias))
        found = parts[2 if self._of_bias else 1]
        assert found is not None
        return found.reshape(-1).to(self.log_sums.dtype)

    def squares(self, factors: Tensor | None, chunk_bytes: int, along: Tensor | None = None) -> Squares:
        """Write out a gradient at a time, unless those of whole examples fit into a block and need not be."""
        V, d = self._head.W.shape
        T = max((b - a for a, b in pairwise(self._bounds)), default=0)
        needless = self._of_bias or (factors is None and T * (V + d) <= V * d)
        dots = None if along is None else self.along(along, chunk_bytes)
        if T <= 1 or (needless and self._longest_block >= T):
            return Squares(*self._from_rows(factors, T), dots)
        total, norms = None if factors is None else self.log_sums.new_zeros(self.numel), []
        for i in range(self.num_examples):
            g = self._one(i)
            norms.append(torch.linalg.vector_norm(g).square())
            if total is not None and factors is not None:
                total.addcmul_(g, g, value=float(factors[i]))
        return Squares(total, torch.stack(norms)[None], dots)

    def _from_rows(self, factors: Tensor | None, T: int) -> tuple[Tensor | None, Tensor]:
        """Return the weighted sum of squares and the norms, from the gradients in the logits of whole examples."""
        norms = self.log_sums.new_zeros(self.num_examples)
        total = None if factors is None else self.log_sums.new_zeros(self.numel)
        for (start, stop), q, h in self._walk(self._whole_examples()):
            first = self._bounds[start]
            for i in range(start, stop) if T > 1 else ():
                own = slice(self._bounds[i] - first, self._bounds[i + 1] - first)
                if not self._of_bias:
                    norms[i] = ((q[own] @ q[own].T) * (h[own] @ h[own].T)).sum().clamp_min(0)
                    continue
                g = q[own].sum(0)
                norms[i] = g @ g
                if total is not None and factors is not None:
                    total.addcmul_(g, g, value=float(factors[i]))
            if T > 1 or start == stop:
                continue
            with_rows = [i for i in range(start, stop) if self._bounds[i] < self._bounds[i + 1]]
            squares, of_h = q.square_(), torch.ones_like(h[:, :1]) if self._of_bias else h.square()
            norms[with_rows] = squares.sum(1) * of_h.sum(1)
            if total is not None and factors is not None:
                total.view(-1, of_h.shape[1]).addmm_(squares.mul_(factors[with_rows, None]).T, of_h)
        return total, norms[None]

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        terms = [self.log_sums.new_zeros(0)]
        for _, q, h in self._walk():
            terms.append((q @ probe.left) * (probe.right[0] if self._of_bias else h @ probe.right))
        joined = torch.cat(terms)
        return joined.sum(), joined.abs().sum()

    def along(self, vector: Tensor, chunk_bytes: int) -> Tensor:  # noqa: ARG002 - a block of rows is what is held
        terms = [self.log_sums.new_zeros(0)]
        for _, q, h in self._walk():
            terms.append(
                q @ vector if self._of_bias else torch.linalg.vecdot(q, h @ vector.view(len(self._head.W), -1).T)
            )
        return torch.stack([part.sum() for part in torch.cat(terms).split([b - a for a, b in pairwise(self._bounds)])])

    # -- blocks -------------------------------------------------------------------------------------------------------

    @property
    def _longest_block(self) -> int:
        return max((rows.stop - rows.start for rows in self._head.rows()), default=0)

    def _rows(self, start: int, stop: int) -> slice:
        return slice(self._bounds[start], self._bounds[stop])

    def _whole_examples(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of as many examples as have rows for a block."""
        start, most = 0, self._longest_block
        for i in range(self.num_examples):
            if self._bounds[i + 1] - self._bounds[start] > most:
                yield start, i
                start = i
        yield start, self.num_examples

    def _walk(
        self, examples: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Yield which examples (or (0, 0)), the gradients in their logits, and what went into the layer."""
        places = None if examples is None else list(examples)
        blocks = None if places is None else [self._rows(*place) for place in places]
        found = self._head.logit_gradients(self._sizes, self.log_sums, blocks=blocks)
        for place, (rows, q) in zip(places or itertools.repeat((0, 0)), found, strict=False):
            yield place, q, self._head.h[rows].to(q.dtype)
