"""Kronecker factors of one layer: their sums over a step, their averages over steps, and what they make of a gradient.

The curvature of a layer with gradients sum_t l_t r_t' (`optimizers.kronecker.layers`) is taken for

    K = L (x) R,    L = sum_t l_t l_t',    R = sum_t r_t r_t' / T    over T positions,

which is exact where l and r are independent. Where calls of several kinds share a parameter, each is such a product,
and their sum is replaced by the product with the same traces over either side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimizers.kronecker.eigen import eigenbasis
from optimizers.kronecker.layers import Rows

__all__ = ["FactorSums", "State", "damped_inverses", "eigenbases", "product_of_traces", "rotated", "solve"]

State = dict[str, Tensor]
VECTOR_DIM = 256
"""Longest vector (scales, shifts, gains) with a full block; of a longer one the diagonal is kept."""


@dataclass
class FactorSums:
    """What the calls of one layer add up to in a step, over columns, micro-batches and ranks.

    Attributes:
        kinds: of calls -> [sum l l', sum r r', number of positions]; (G, n, n), or (G, n) where only a diagonal is
            kept.
        loss_left: of each kind, whether l holds the gradients.
        squares: sum over positions of (Q_L' l)^2 (Q_R' r)^2', (G, rows, columns), where bases were given.
    """

    kinds: dict[str, list[Tensor]] = field(default_factory=dict)
    loss_left: dict[str, bool] = field(default_factory=dict)
    squares: Tensor | None = None

    def add(self, kind: str, rows: Rows, weight: float, first: bool, max_dim: int, state: State | None) -> None:
        """Add the rows of one column.

        Args:
            kind: of the call.
            rows: of the call.
            weight: what the column counts; it may be negative.
            first: whether it is the call's first column, with which its inputs are counted.
            max_dim: longest side of which all products are kept.
            state: of the layer, with bases to rotate to; None where squares are not asked for.
        """
        once = float(first)
        on_left, on_right = (weight, once) if rows.loss_left else (once, weight)
        if rows.num_rows:
            assert rows.right is not None
            left = on_left * torch.bincount(rows.left, minlength=rows.num_rows)[None].to(rows.right.dtype)
        else:
            left = _moment(rows.left, on_left, min(max_dim, VECTOR_DIM) if rows.right is None else max_dim)
        if rows.right is None:
            right, number = left.new_full((len(left), 1, 1), once), once
        else:
            right, number = _moment(rows.right, on_right, max_dim), once * rows.right.shape[1]
        found = [left, right, left.new_tensor(number)]
        self.loss_left[kind] = rows.loss_left
        before = self.kinds.get(kind)
        self.kinds[kind] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        if state is not None and "spread" in state and state["spread"].shape == _shape(rows):
            squares = _squares(rows, state).mul_(weight)
            self.squares = squares if self.squares is None else self.squares.add_(squares)

    def join(self, other: FactorSums) -> None:
        """Add those of another micro-batch."""
        for kind, found in other.kinds.items():
            before = self.kinds.get(kind)
            self.kinds[kind] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
            self.loss_left[kind] = other.loss_left[kind]
        if other.squares is not None:
            self.squares = other.squares if self.squares is None else self.squares + other.squares

    def product(self) -> tuple[Tensor, Tensor]:
        """Return L and R."""
        terms = [(left, right / number) for left, right, number in self.kinds.values()]
        return terms[0] if len(terms) == 1 else product_of_traces(terms)


def _moment(rows: Tensor, weight: float, max_dim: int) -> Tensor:
    """Return the weighted sum of products of rows (G, R, n) with themselves, (G, n, n), or its diagonal (G, n)."""
    if weight == 0:
        return rows.new_zeros((len(rows), *(rows.shape[2:] * (2 if rows.shape[2] <= max_dim else 1))))
    if rows.shape[2] > max_dim:
        return weight * rows.square().sum(1)
    product = rows[0].T @ rows[0] if len(rows) == 1 else rows.mT @ rows
    return weight * product.view(len(rows), *product.shape[-2:])


def _shape(rows: Rows) -> tuple[int, int, int]:
    """Return (G, rows, columns) of the layer's matrix."""
    groups = len(rows.left if rows.right is None else rows.right)
    return groups, rows.num_rows or rows.left.shape[2], 1 if rows.right is None else rows.right.shape[2]


def _squares(rows: Rows, state: State) -> Tensor:
    dtype = (rows.left if rows.right is None else rows.right).dtype
    left, right = (state[name].to(dtype) if name in state else None for name in ("left_basis", "right_basis"))
    if rows.right is None:
        turned = rows.left if left is None else rows.left @ left
        return turned.square().sum(1)[..., None]
    r = (rows.right if right is None else rows.right @ right).square()
    if rows.num_rows:
        return r.new_zeros(1, rows.num_rows, r.shape[2]).index_add_(1, rows.left, r)
    turned = rows.left if left is None else rows.left @ left
    return turned.square().mT @ r


def product_of_traces(terms: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return L, R with the traces over either side of sum_i L_i (x) R_i: exact where that is one product."""
    terms = list(terms)
    dense = [any(term[side].ndim == 3 for term in terms) for side in (0, 1)]
    lefts, rights = ([_as(term[side], dense[side]) for term in terms] for side in (0, 1))
    of_left, of_right = ([_trace(t) for t in side] for side in (lefts, rights))
    total = sum(a * b for a, b in zip(of_left, of_right, strict=True))
    root = torch.as_tensor(total).clamp(min=torch.finfo(lefts[0].dtype).tiny).sqrt()
    left = sum(_scaled(t, b / root) for t, b in zip(lefts, of_right, strict=True))
    right = sum(_scaled(t, a / root) for t, a in zip(rights, of_left, strict=True))
    return torch.as_tensor(left), torch.as_tensor(right)


def _as(factor: Tensor, dense: bool) -> Tensor:
    return torch.diag_embed(factor) if dense and factor.ndim == 2 else factor


def _trace(factor: Tensor) -> Tensor:
    """Return the traces of factors, (G,)."""
    return (factor.diagonal(dim1=-2, dim2=-1) if factor.ndim == 3 else factor).sum(-1)


def _scaled(factor: Tensor, by: Tensor) -> Tensor:
    return factor * by.view(-1, *[1] * (factor.ndim - 1))


def damped_inverses(left: Tensor, right: Tensor, damping: float) -> State | None:
    """Return the inverses of L + sqrt(damping) pi I and R + sqrt(damping) / pi I, pi^2 the ratio of their mean traces.

    Where a side has one entry, the damping is that of the product. None where a factor is not finite.

    Reference: Martens and Grosse (2015), section 6.3.
    """
    if right.shape[-1] == 1 or left.shape[-1] == 1:
        one, other, side = (right, left, "left") if right.shape[-1] == 1 else (left, right, "right")
        scale = _trace(one)
        inverse = _inverse(_scaled(other, scale), torch.full_like(scale, damping))
        ones = torch.ones_like(one)
        return None if inverse is None else {f"{side}_inverse": inverse, f"{_other(side)}_inverse": ones}
    means = [(_trace(t) / t.shape[-1]).clamp(min=torch.finfo(t.dtype).tiny) for t in (left, right)]
    pi = (means[0] / means[1]).sqrt().clamp(1e-6, 1e6)
    inverses = [_inverse(t, damping**0.5 * p) for t, p in ((left, pi), (right, 1 / pi))]
    if inverses[0] is None or inverses[1] is None:
        return None
    return {"left_inverse": inverses[0], "right_inverse": inverses[1]}


def _other(side: str) -> str:
    return "right" if side == "left" else "left"


def _inverse(factor: Tensor, damping: Tensor) -> Tensor | None:
    if factor.ndim == 2:
        inverse = 1 / (factor.clamp(min=0) + damping[:, None])
        return inverse if bool(inverse.sum().isfinite()) else None
    damped = factor + torch.diag_embed(damping[:, None].expand(factor.shape[:2]))
    root, info = torch.linalg.cholesky_ex(damped)
    if not bool(info.any()):
        inverse = torch.cholesky_inverse(root)
        if bool(inverse.sum().isfinite()):
            return inverse
    found = []  # not definite to rounding: by eigenvectors
    for part, shift in zip(factor, damping, strict=True):
        pair = eigenbasis(part, part.dtype)
        if pair is None:
            return None
        found.append(pair[1] / (pair[0] + shift) @ pair[1].T)
    return torch.stack(found)


def eigenbases(left: Tensor, right: Tensor) -> State | None:
    """Return the eigenvectors of dense factors, and `spread`, the eigenvalues of their product (G, rows, columns).

    None where a factor is not finite or cannot be decomposed.
    """
    found: State = {}
    values = []
    for name, factor in (("left", left), ("right", right)):
        if factor.ndim == 2:
            values.append(factor.clamp(min=0))
            continue
        pairs = [eigenbasis(part, part.dtype) for part in factor]
        if any(pair is None for pair in pairs):
            return None
        values.append(torch.stack([pair[0] for pair in pairs if pair is not None]))
        found[f"{name}_basis"] = torch.stack([pair[1] for pair in pairs if pair is not None])
    found["spread"] = values[0][:, :, None] * values[1][:, None]
    return found if bool(found["spread"].sum().isfinite()) else None


def rotated(matrix: Tensor, state: State, *, back: bool = False) -> Tensor:
    """Return Q_L' M Q_R, or Q_L M Q_R' of what was rotated; diagonal sides stay."""
    left, right = state.get("left_basis"), state.get("right_basis")
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    return matrix if right is None else matrix @ (right.mT if back else right)


def solve(matrix: Tensor, state: State, damping: float) -> Tensor:
    """Return the preconditioned M (G, rows, columns), by inverses or by bases, whichever the state holds."""
    if "spread" in state:
        spread = state["spread"].clamp(min=0)
        return rotated(rotated(matrix, state) / (spread + damping), state, back=True)
    left, right = state["left_inverse"], state["right_inverse"]
    matrix = left @ matrix if left.ndim == 3 else left[:, :, None] * matrix
    return matrix @ right if right.ndim == 3 else matrix * right[:, None]
