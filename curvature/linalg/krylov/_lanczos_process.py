"""Lanczos runs side by side that are grown step by step, in the inner product of a preconditioner where there is one.

    A V = W T + beta_m w_(m+1) e_m',   V'W = I,   W = P V,

with W = V without preconditioner. All vectors are kept and kept orthogonal, so that what is computed from T holds for
A as long as the run lasts. A run that has exhausted its Krylov space rests.

Where vectors lie in parts on several ranks, all inner products with the basis and the norm come in one all-reduce, and
those of the second projection in another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvature.errors import NonFiniteError
from curvature.linalg.base.systems import indefinite, preconditioned
from curvature.linalg.base.validate import (
    non_finite_message,
    rounding_level,
    squares_in_range,
    unit_of,
    working_dtype,
)
from curvature.linop import MatrixLike
from curvature.sharding.algebra import products_and_squares
from curvature.sharding.tensors import ShardedTensor


class LanczosProcess:
    """Runs from the columns of X, (n, p), none of them zero, for the matrix A + damping I.

    There is room for `capacity` vectors, which grows; residuals below the share `level` of |A| end a run.
    """

    def __init__(
        self,
        A: MatrixLike,
        X: Tensor,
        *,
        damping: float = 0.0,
        preconditioner: Any = None,
        capacity: int = 8,
        level: float | None = None,
    ) -> None:
        self.level = rounding_level(A) if level is None else level
        self.A, self.damping, self.preconditioner = A, damping, preconditioner
        self.dtype, self.num_matvecs = working_dtype(A), 0
        self.n, self.num_runs = X.shape
        self.alpha: list[list[float]] = [[] for _ in range(self.num_runs)]
        self.beta: list[list[float]] = [[] for _ in range(self.num_runs)]
        """beta[i][j] couples step j to j + 1; the last one to the vector that comes next."""
        self.resting = [False] * self.num_runs
        self.V = X.new_zeros(self.num_runs, capacity, self.n, dtype=self.dtype)
        self.W = self.V if preconditioner is None else self.V.clone()
        self.m = 0
        self.cut: int | None = None
        """How many vectors a single run had when it was restarted."""
        self.columns: list[Tensor] = []
        """V'A v_j for every j since then, float64 on the CPU."""
        self.scale = torch.zeros(self.num_runs, dtype=self.dtype, device=X.device)
        self.start_norms = self._place(X.to(self.dtype))

    def _place(self, R: Tensor) -> list[float]:
        """Make columns R = P v (n, p) the next vectors, v of norm 1; return their norms."""
        Y = preconditioned(self.preconditioner, R)
        squares = (R * Y).sum(dim=0)
        norms: list[float] = squares.double().clamp_min(0).sqrt().tolist()
        if any(not norm > 0 for norm in norms):
            raise indefinite(float(squares.min()))
        self._append(Y / squares.sqrt(), R / squares.sqrt())
        return norms

    def _append(self, V: Tensor, W: Tensor) -> None:
        if self.m == self.V.shape[1]:
            capacity = min(2 * self.m, self.n)
            grown = [X.new_zeros(self.num_runs, capacity, self.n) for X in self._stores()]
            for new, old in zip(grown, self._stores(), strict=True):
                new[:, : self.m] = old
            self.V, self.W = grown[0], grown[-1]
        self.V[:, self.m] = V.T
        if self.W is not self.V:
            self.W[:, self.m] = W.T
        self.m += 1

    def _stores(self) -> list[Tensor]:
        return [self.V] if self.W is self.V else [self.V, self.W]

    @property
    def over(self) -> bool:
        """Whether no run can go on."""
        return all(self.resting)

    def step(self) -> None:
        """Multiply the latest vector of every run that goes on, once, and make the next ones."""
        going = [i for i, rests in enumerate(self.resting) if not rests]
        active = slice(None) if len(going) == self.num_runs else going
        v = self.V[active, self.m - 1]
        self.num_matvecs += len(going)
        R = (self.A @ v.T.to(self.A.dtype)).T.to(self.dtype)
        if self.damping:
            R = R + self.damping * v
        V, W = self.V[active, : self.m], self.W[active, : self.m]
        in_parts = isinstance(R, ShardedTensor) and self.preconditioner is None
        found = self._projected_in_parts(V, R) if in_parts else None
        if found is None:
            found = self._projected(V, W, R)
        R, Y, unit, sizes, products, squares = found
        self.scale[active] = torch.maximum(self.scale[active], unit * sizes)
        alpha, beta = products[:, -1], squares.clamp_min(0).sqrt()
        if self.cut is not None:
            self.columns.append(unit * products[0].double().cpu())
        facts = torch.stack([alpha, beta, self.scale[active] / unit, squares]).double().tolist()
        following = []
        for i, a, b, scale, square in zip(going, *facts, strict=True):
            if not (math.isfinite(a) and math.isfinite(square)):
                raise NonFiniteError(non_finite_message(self.num_matvecs))
            if square < -1e-5 * scale**2:
                raise indefinite(square)
            self.resting[i] = b <= self.level * scale or len(self.alpha[i]) + 1 == self.n
            self.alpha[i].append(unit * a)
            self.beta[i].append(0.0 if self.resting[i] else unit * b)
            following.append(not self.resting[i])
        if any(following):
            keep = torch.tensor(following, device=R.device)[:, None]
            divisor = torch.where(keep, beta[:, None], 1)
            next_V, next_W = (self.V.new_zeros(self.num_runs, self.n) for _ in range(2))
            next_V[active], next_W[active] = torch.where(keep, Y / divisor, 0), torch.where(keep, R / divisor, 0)
            self._append(next_V.T, next_W.T)

    def _projected(self, V: Tensor, W: Tensor, R: Tensor) -> tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor]:
        """Return R / unit without its part in the basis, P^-1 times it, unit, norm before, V'R / unit, norm^2 after."""
        unit = unit_of(R, self.num_matvecs, first=not bool(self.scale.any()))
        R = R if unit == 1 else R / unit
        sizes, products = self._dual_norm(R), (V @ R[:, :, None])[..., 0]
        alpha = (V[:, -1] * R).sum(dim=1, keepdim=True)  # to more digits than by the product of matrices
        R = R - (products[:, None] @ W)[:, 0]
        R = R - ((V @ R[:, :, None]).mT @ W)[:, 0]  # twice is enough
        Y = preconditioned(self.preconditioner, R.T).T
        return R, Y, unit, sizes, torch.cat([products[:, :-1], alpha], dim=1), (R * Y).sum(dim=1)

    def _projected_in_parts(self, V: Tensor, R: Tensor) -> Any:
        """Do it by two all-reduces, the norm after the second projection from Pythagoras; None where squares do not."""
        products, before = products_and_squares(V, R)
        if not all(squares_in_range(square, self.n, self.dtype) for square in before.tolist()):
            return None
        R = R - (products.to(R.dtype)[:, None] @ V)[:, 0]
        again, between = products_and_squares(V, R)
        R = R - (again.to(R.dtype)[:, None] @ V)[:, 0]
        after = between - again.square().sum(dim=1)
        if not bool((after > 0.5 * between).all()):  # rounding of the first projection is most of it
            after = torch.linalg.vector_norm(R, dim=1).square()
        return R, R, 1.0, before.sqrt().to(R.dtype), products.to(R.dtype), after.to(R.dtype)

    def _dual_norm(self, R: Tensor) -> Tensor:
        """Return |R| row by row in the norm of P^-1."""
        return (R * preconditioned(self.preconditioner, R.T).T).sum(dim=1).clamp_min(0).sqrt()

    def restart(self, x: Tensor) -> bool:
        """Go on from x (n,) instead, made orthogonal to a single run's vectors; False if nothing is left of x.

        The vector that would have come next is given up: the last beta stays coupled to nothing.
        """
        if not self.resting[0]:
            self.m -= 1
        self.cut, R = self.m, x.to(self.dtype)
        V, W = self.V[0, : self.m], self.W[0, : self.m]
        size = float(torch.linalg.vector_norm(R))
        for _ in range(2):
            R = R - W.T @ (V @ R)
        if self.m == self.n or float(torch.linalg.vector_norm(R)) <= 1e3 * torch.finfo(R.dtype).eps * size:
            return False
        self._place(R[:, None])
        self.resting = [False]
        return True

    def projected(self) -> Tensor:
        """Return T = V'A V of a single run, (m, m) for the m vectors that were multiplied, float64 on the CPU."""
        m = len(self.alpha[0])
        cut = m if self.cut is None else self.cut
        T = torch.zeros(m, m, dtype=torch.float64)
        T.diagonal()[:cut] = torch.tensor(self.alpha[0][:cut], dtype=torch.float64)
        T.diagonal(1)[: cut - 1] = torch.tensor(self.beta[0][: cut - 1], dtype=torch.float64)
        for j, column in enumerate(self.columns, start=cut):
            T[: j + 1, j] = column
        return T.triu() + T.triu(1).T

    def loose(self, h: Tensor) -> float:
        """Return a bound of |A V h - W T h| in the norm of P^-1: its size, but for vectors given up."""
        ends = {len(self.alpha[0]) - 1, (self.cut or len(self.alpha[0])) - 1}
        return sum(self.beta[0][j] * abs(float(h[j])) for j in ends)

    def combine(self, coefficients: list[Tensor]) -> Tensor:
        """Return sum_j coefficients[i][j] v_j for every run i, (n, p)."""
        H = torch.zeros(self.num_runs, self.m, dtype=torch.float64)
        for row, h in zip(H, coefficients, strict=True):
            row[: len(h)] = h
        H = H.to(device=self.V.device, dtype=self.dtype)
        return (H[:, None] @ self.V[:, : self.m])[:, 0].T
