"""Inverses of curvature matrices, in blocks, and what they say of removing weights.

Optimal brain surgeon removes the weights Q and moves the others so that the quadratic model of the loss rises least:

    min 1/2 d'A d  with  d_Q = -w_Q:    d = -C_:Q (C_QQ)^-1 w_Q,    1/2 d'A d = 1/2 w_Q' (C_QQ)^-1 w_Q,    C = A^-1.

Of a single weight q alone this is w_q^2 / (2 C_qq), to which the linear term adds g'd = -w_q (C g)_q / C_qq.

References: LeCun, Denker and Solla (1990), Optimal brain damage; Hassibi and Stork (1993), Second order derivatives for
network pruning: optimal brain surgeon; Singh and Alistarh (2020), WoodFisher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.errors import InputError

__all__ = ["InverseBlocks", "block_places", "dense_inverse", "greedy_scores", "recursive_inverse"]


@dataclass(frozen=True)
class InverseBlocks:
    """C, block-diagonal, with blocks of one size, in float64: its entries span many orders of magnitude."""

    places: Tensor
    """(k, b), where the rows of each block lie in the flat vector; -1 for rows that stand for no weight."""
    C: Tensor
    """(k, b, b), the inverses of the damped blocks."""
    damping: float
    """What was added to the diagonal before."""

    def gather(self, flat: Tensor) -> Tensor:
        """Return the entries of a vector (n,) by block, (k, b), zeros where there are none."""
        return torch.where(self.places >= 0, flat[self.places.clamp_min(0)].to(self.C.dtype), 0.0)

    def scatter(self, blocks: Tensor, n: int) -> Tensor:
        """Return the vector (n,) of entries by block, zeros elsewhere."""
        there = self.places >= 0
        return blocks.new_zeros(n).index_put((self.places[there],), blocks[there])

    def solve(self, g: Tensor) -> Tensor:
        """Return C g, (n,)."""
        return self.scatter((self.C @ self.gather(g)[..., None])[..., 0], len(g))

    def diagonal(self, n: int) -> Tensor:
        """Return the diagonal of C, (n,)."""
        return self.scatter(self.C.diagonal(dim1=1, dim2=2), n)

    def displacement(self, w: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
        """Return the best displacement d (n,) that takes the pruned weights to zero, and 1/2 d'A d without damping."""
        where = self.gather(pruned)
        eye = torch.eye(self.C.shape[1], dtype=self.C.dtype, device=w.device)
        between = self.C * where[:, :, None] * where[:, None, :] + eye * (1 - where)[:, :, None]
        goal = self.gather(w) * where
        x = torch.linalg.solve(between, goal[..., None])
        d = -(self.C @ (x * where[..., None]))[..., 0]
        flat = torch.where(pruned, -w.to(self.C.dtype), self.scatter(d, len(w)))
        rise = (goal * x[..., 0]).sum() / 2 - self.damping * flat.square().sum() / 2
        return flat.to(w.dtype), float(rise)


def block_places(slices: Iterable[tuple[int, int]], size: int, device: torch.device) -> Tensor:
    """Return places (k, b) of consecutive entries, at most `size` a block, none of which spans two slices."""
    found = []
    for start, stop in slices:
        count = -(-(stop - start) // size)
        rows = torch.full((count * size,), -1, device=device)
        rows[: stop - start] = torch.arange(start, stop, device=device)
        found.append(rows.view(count, size))
    return torch.cat(found)


def dense_inverse(A: Tensor, damping: float) -> Tensor:
    """Return (A + damping I)^-1 of symmetric matrices (..., b, b) by Cholesky's factors.

    Raises:
        InputError: for a matrix that is not positive definite.
    """
    damped = (A + A.mT) / 2 + damping * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    L, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise InputError(
            f"a block of the matrix is not positive definite under a damping of {damping:.3g}: removing weights has no "
            "best displacement; raise the damping, or take the Gauss-Newton matrix."
        )
    return torch.cholesky_inverse(L)


def greedy_scores(C: Tensor, w: Tensor, may: Tensor) -> Tensor:
    """Return by how much the quadratic model has risen when each weight goes, one after the other, (n,).

    The weight that costs the least is removed, the others move, and the inverse of what is left is

        C <- C - C_:q C_q: / C_qq,

    until none is left that may go. Cost: n^2 for each.

    Args:
        C: (n, n), the inverse of the damped matrix.
        w: (n,).
        may: (n,), boolean: weights that may go.
    """
    C, w, alive = C.clone(), w.to(C.dtype).clone(), may.clone()
    scores, risen = torch.full_like(w, torch.inf), torch.zeros((), dtype=C.dtype, device=C.device)
    for _ in range(int(may.sum())):
        diagonal = C.diagonal()
        q = int(torch.where(alive, w.square() / diagonal, torch.inf).argmin())
        risen = risen + w[q].square() / (2 * diagonal[q])
        scores[q] = risen
        column = C[:, q].clone()
        w -= column * (w[q] / column[q])
        C.addr_(column, column, alpha=-1 / float(column[q]))
        alive[q] = False
    return scores


def recursive_inverse(rows: Iterable[Tensor], C: Tensor) -> Tensor:
    """Return (C^-1 + sum_i r_i r_i')^-1 by the recursion of WoodFisher, a chunk of rows at a time.

        C <- C - C R' (I + R C R')^-1 R C,    for rows one by one:  C <- C - (C r)(C r)' / (1 + r'C r).

    Args:
        rows: chunks (c, k, b) of rows by block; gradients of examples times the root of their share.
        C: (k, b, b), the inverse to start from: I / damping.
    """
    for R in rows:
        by_block = R.transpose(0, 1)  # (k, c, b)
        CR = C @ by_block.mT
        small = by_block @ CR + torch.eye(R.shape[0], dtype=C.dtype, device=C.device)
        C = C - CR @ torch.linalg.solve(small, CR.mT)
        C = (C + C.mT) / 2
    return C
