"""The basis of thick-restart Lanczos over vectors that lie in parts on several ranks: one all-reduce a step.

A direction x is projected once before it is multiplied. The inner products V'x and x'x that would project it a second
time and give its norm come together with those of its product, V'Ax, x'Ax and |Ax|^2. With g = V'x, v = (x - V g) / nu
is the next vector of V, A v follows from A V = V T + x C, and what is left of A x outside of V and v, whose norm is
known from Pythagoras, is the next direction. Where little is left, that norm and one projection are not good enough,
and the step is finished as without ranks.

Reference: Bielich, Langou, Thomas, Swirydowicz, Yamazaki and Boman (2022), Low-synch Gram-Schmidt with delayed
reorthogonalization for Krylov solvers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvature.environment.device import is_gpu
from curvature.environment.memory import drop_pages
from curvature.linalg.base.validate import squares_in_range
from curvature.linalg.krylov._krylov_space import KrylovSpace
from curvature.linalg.krylov._rounded_space import GPU_COLUMNS
from curvature.linop import MatrixLike
from curvature.sharding.tensors import ShardedTensor, all_reduce, held

_FEW = 1 << 13  # coordinates that a restart treats at a time, and libraries copy; a basis fills a rank's memory
_CACHED = 1 << 14  # coordinates whose inner products with a basis are taken at a time
_LEFT, _DIGITS = 1e-6, 1e5  # of |A x|^2: less than that, or so many units of rounding, is a small rest


class ShardedSpace(KrylovSpace):
    """V and P in parts; between steps the direction in P is orthogonal to V to 1e-13, in single precision to 1e-6."""

    @staticmethod
    def kind(A: MatrixLike) -> type[KrylovSpace]:
        """Return the kind of space for A: this one, if its vectors lie in parts."""
        return KrylovSpace if getattr(A, "sharding", None) is None else ShardedSpace

    def absorb(self, AX: Tensor) -> None:
        one = AX.shape[1] == self.num_directions == 1 and self.num_known == 0 and self._frame is None
        self._reserve(self.first + self.count + 2)
        if one and isinstance(AX, ShardedTensor) and isinstance(self.rows, ShardedTensor):
            rest = self._absorb_one(self.rows.local, AX.local[:, 0].to(self.dtype), AX)
        else:
            rest = AX
        if rest is not None:
            super().absorb(rest)

    def restart(self, S: Tensor) -> None:
        if self.num_known:
            super().restart(S)
            return
        rows, old, weights = held(self.rows), self.count, S.T.to(held(self.rows))
        for part in rows[:old].split(_FEW, dim=1):
            part[: len(weights)] = weights @ part
        self.T, self.C, self.D = S.T @ self.T @ S, self.C @ S, self.D @ S
        self.count = len(weights)
        for i in range(self.num_directions):  # forwards, so that nothing is read after it was written
            rows[self.count + i].copy_(rows[old + i])
        if rows.device.type == "cpu":
            drop_pages(rows[self.count + self.num_directions :])  # until the basis has grown there again

    def _absorb_one(self, rows: Tensor, w: Tensor, AX: ShardedTensor) -> Tensor | None:
        """Take a step by one reduction; return the product that is left to be taken otherwise, if any."""
        m = self.count
        V, x = rows[:m], rows[m]
        owned = AX.sharding.owned
        width = GPU_COLUMNS if is_gpu(w.device) else _CACHED
        inner = torch.zeros(2 * (m + 1) + 1, dtype=torch.float64, device=w.device)
        for first in range(0, len(w), width):
            part = slice(first, first + width)
            two = [x[part], w[part]]
            if owned is not None:  # what sums over all ranks count
                two = [t * owned[part].to(t.device) for t in two]
            for i, t in enumerate(two):  # one by one, as matrix products copy what they multiply
                inner[i:-1:2] += rows[: m + 1, part] @ t
            inner[-1] += w[part] @ two[1]
        inner = all_reduce(inner, AX.sharding.group).cpu()
        ww = float(inner[-1])
        if not squares_in_range(ww, self.n, self.dtype):
            return AX  # which says what is wrong with it
        products = inner[:-1].view(m + 1, 2)
        (g, s), (xx, xw) = products[:m].unbind(dim=1), products[m].tolist()
        nu = math.sqrt(max(xx - float(g @ g), 0.0))
        if not abs(nu - 1) < 0.1:
            return AX
        x.addmv_(V.T, g.to(x), alpha=-1).div_(nu)  # from here on it is v
        row = self.C[0]
        along = float(row @ g)
        self.T = self.T + (torch.outer(g, row) + torch.outer(row, g)) / 2
        b = (xw - float(g @ s)) / nu
        left = ww - float(s @ s) - b**2
        self.C = nu * self.C
        if not left > max(_LEFT, _DIGITS * torch.finfo(self.dtype).eps) * ww:
            w = torch.addmv(w, V.T, (self.T @ g).to(w), alpha=-1).sub_(x, alpha=nu * along).div_(nu)
            return ShardedTensor(w[:, None], AX.sharding, 0)
        h = torch.cat([(s - self.T @ g) / nu, torch.tensor([b / nu - along], dtype=torch.float64)])
        rows[m + 1].copy_(w).addmv_(V.T, s.to(w), alpha=-1).sub_(x, alpha=b).div_(math.sqrt(left))  # in its place
        T = torch.nn.functional.pad(self.T, (0, 1, 0, 1))
        T[m], T[:, m] = h, h
        self.T, self.D = T, self.D.new_zeros(0, m + 1)
        self.C = torch.zeros(1, m + 1, dtype=torch.float64)
        self.C[0, m] = math.sqrt(left) / nu
        self.num_matvecs, self.count, self._injected = self.num_matvecs + 1, m + 1, False
        self.num_directions = 1
        self.norm = max(self.norm, float(torch.linalg.vector_norm(h)))
        return None
