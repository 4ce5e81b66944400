"""The basis of thick-restart Lanczos held in fewer bits than it is computed in.

The rounded rows are taken for what they are: they, not what was rounded, are multiplied and orthogonalised against, and
with their inner products V'V = L L' beside T = V'AV the Ritz values are those of their span,

    T s = theta V'V s,

which errs in the eigenvalues by the square of what the span lacks. Only the residual P C leaves out what rounding took
from the directions: the solver multiplies the pairs it returns once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from curvature.environment.device import is_gpu
from curvature.environment.memory import drop_pages
from curvature.errors import InputError
from curvature.linalg.base.orthonormal import gram_schmidt, orthonormalise
from curvature.linalg.base.places import Place, empty_rows
from curvature.linalg.base.validate import working_dtype
from curvature.linalg.krylov._krylov_space import KrylovSpace, dependent_share, floor_of
from curvature.linop import MatrixLike

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COLUMNS, GPU_COLUMNS = 1 << 16, 1 << 20  # coordinates that are widened at a time, for caches and for launches
_DROP = 32  # pieces after which the pages of a basis on disk are let go of
_ROOT_MEAN_SQUARE = 0.2  # of the relative rounding error of a coordinate, in units of eps


def check_basis_dtype(A: MatrixLike, basis_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the basis: the working dtype, or a narrower one that was asked for."""
    dtype = working_dtype(A)
    if basis_dtype is None:
        return dtype
    if basis_dtype not in _DTYPES or torch.promote_types(basis_dtype, dtype) != dtype:
        allowed = ", ".join(str(d) for d in _DTYPES if torch.promote_types(d, dtype) == dtype)
        raise InputError(f"basis_dtype must be one of {allowed}, no wider than what is computed in, got {basis_dtype}.")
    if basis_dtype != dtype and getattr(A, "sharding", None) is not None:
        raise InputError("a basis of sharded vectors is held in the working dtype; leave basis_dtype out.")
    return basis_dtype


class RoundedSpace(KrylovSpace):
    """V and P in `basis_dtype`, a few columns at a time in the working dtype; U, apart, in the working dtype.

    T, C and D belong to the rows as they are stored; coefficients S to the orthonormal basis V L^-T. G holds the inner
    products of all rows, U, V and P, so that projections are exact.
    """

    def __init__(self, A: MatrixLike, *, basis_dtype: torch.dtype, **measures: Any) -> None:
        self.basis_dtype = basis_dtype
        # float16 has few exponents: coordinates of a unit vector are scaled to about 1
        exponent = round(math.log2(A.shape[0]) / 2) if basis_dtype is torch.float16 else 0
        self.scale = 2.0 ** min(exponent, 15)
        self.G = torch.eye(measures["known"].shape[1], dtype=torch.float64)
        self.action = math.inf
        self.dropped = 0.0
        super().__init__(A, **measures)

    def _allocate(self, known: Tensor, size: int) -> Tensor:
        self.first = 0
        rows = empty_rows(size, self.n, self.basis_dtype, self._place)
        self.U = known.T.to(rows.device)
        self.columns = GPU_COLUMNS if is_gpu(rows.device) else COLUMNS
        return rows

    def noise_of(self, values: Tensor) -> Tensor:
        """Return the residual norms that rounded rows leave of pairs with these eigenvalues.

        (A - theta) d for a rounding error d, a random direction, which A stretches no more than the least stretched one
        it was multiplied with.
        """
        d = _ROOT_MEAN_SQUARE * torch.finfo(self.basis_dtype).eps
        return d * torch.hypot(values, values.new_tensor(min(self.action, self.norm)))

    def rounding(self) -> float:
        return max(super().rounding(), self.dropped)

    def noise(self) -> float:
        # more would see exhausted spaces more surely, and cost accuracy of eigenvalues that are small beside |A|
        return max(super().noise(), 0.5 * torch.finfo(self.basis_dtype).eps * self.norm)

    def _clear(self) -> None:
        """Drop what the rounding of the rows makes of an invariant space; the residuals of a result are computed."""
        if self.num_directions and self.exhausted():
            self.dropped = max(self.dropped, float(torch.linalg.vector_norm(self.C)))
            self.num_directions, self.C = 0, self.C[:0]
            self._measure(self.count)
        super()._clear()

    def absorb(self, AX: Tensor) -> None:
        old = self.count
        super().absorb(AX)
        images = torch.cat([self.T[:, old:], self.C[:, old:], self.D[:, old:]])
        self.action = min(self.action, float(torch.linalg.vector_norm(images, dim=0).min()))

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = self._weights(torch.eye(self.count, dtype=torch.float64))
        T = weights.T @ self.T @ weights
        theta, S = torch.linalg.eigh((T + T.T) / 2)
        self._note_norm(theta)
        return theta, S, torch.linalg.vector_norm(self.C @ weights @ S, dim=0)

    def restart(self, S: Tensor) -> None:
        """Keep V S only, rounded: T follows to first order in what rounding adds."""
        W = self._weights(S)
        weights, P = W.T.to(self.rows.device, self.dtype), self.P.clone()
        k = len(weights)
        M, N = weights.new_zeros(k, k), weights.new_zeros(len(P), k)
        for v, p in self._pieces(self.V, P):  # in place
            exact = weights @ self._wide(v)
            v[:k] = self._stored(exact)
            added = self._wide(v[:k]) - exact
            M += exact @ added.T
            N += self._wide(p) @ added.T
        T, C = W.T @ self.T @ W, self.C @ W
        change = T @ M.double().cpu() + C.T @ N.double().cpu()  # (A V W)'(what was added)
        self.T, self.C, self.D = T + change + change.T, C, self.D @ W
        self.count = k
        self.P.copy_(P)
        self._measure(0)

    def vectors(self, S: Tensor) -> Tensor:
        weights = self._weights(S).T.to(self.rows.device, self.dtype)
        rows = weights.new_empty(len(weights), self.n, device=self.A.device)
        for part, row in self._pieces(self.V, rows):
            row.copy_(weights @ self._wide(part))
        return rows.T

    def _newest_squared(self) -> float:
        place = self.num_known + self.count - 1
        return float(self.G[place, place])

    def refined(
        self, S: Tensor, multiply: Callable[[Tensor], Tensor], width: int, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, descending, vectors and residuals of V S, multiplied anew, `width` columns at a time."""
        U = orthonormalise(self.final(S, keep), self.U.T.to(self.A.device), own=True)
        on_disk = self._place == "disk"
        place: Place = "disk" if on_disk else U.device
        k = U.shape[1]
        AU = empty_rows(k, self.n, self.dtype, place).T
        if on_disk:  # of both, one column is in memory beside what a product takes
            U = empty_rows(k, self.n, self.dtype, place).copy_(U.T).T
        for X, AX in zip(U.split(width, dim=1), AU.split(width, dim=1), strict=True):
            if on_disk:
                drop_pages(U.T)
                drop_pages(AU.T)
            AX.copy_(multiply(X))
        H = (U.T @ AU).double().cpu()
        values, Y = torch.linalg.eigh((H + H.T) / 2)
        values, Y = values.flip(0), Y.flip(1).to(U)
        for part in (*U.split(self.columns), *AU.split(self.columns)):  # in place
            part.copy_(part @ Y)
        return values, U, AU.addcmul_(U, values.to(U), value=-1)

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        return {**super().state_dict(copy=copy), "G": self.G, "action": self.action, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.G, self.action, self.dropped = state["G"].clone(), state["action"], state["dropped"]

    def _set_directions(self, N: Tensor, use: list[int], *, after: int = 0) -> None:
        super()._set_directions(N, use, after=after)
        self._measure(self.count + after)

    def _measure(self, old: int) -> None:
        """Take the inner products of all rows with those from `old` on."""
        rows, first = self.rows[: self.count + self.num_directions], self.num_known + old
        new = rows.new_zeros(self.num_known + len(rows), len(rows) - old, dtype=self.dtype)
        for u, part in self._pieces(self.U, rows):
            wide = self._wide(part)
            new += torch.cat([u, wide]) @ wide[old:].T
        G = torch.zeros(len(new), len(new), dtype=torch.float64)
        G[:first, :first] = self.G[:first, :first]
        G[:, first:] = new.double().cpu()
        G[first:, :first] = G[:first, first:].T
        self.G = G

    def _pieces(self, *of: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the same few columns of each; a basis on disk is in memory where it is at work only."""
        for i, parts in enumerate(zip(*(t.split(self.columns, dim=1) for t in of), strict=True)):
            yield parts
            if self._place == "disk" and i % _DROP == _DROP - 1:
                drop_pages(self.rows)

    def _stored(self, X: Tensor) -> Tensor:
        return (X if self.scale == 1 else X * self.scale).to(self.basis_dtype)

    def _wide(self, rows: Tensor) -> Tensor:
        wide = rows.to(self.dtype)
        return wide if self.scale == 1 else wide.div_(self.scale)

    def _weights(self, S: Tensor) -> Tensor:
        V = slice(self.num_known, self.num_known + self.count)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.G[V, V]).T, S, upper=True)

    def _inner(self, X: Tensor, count: int) -> Tensor:
        """Return the inner products of U and the first `count` rows with the rows of X."""
        H = X.new_zeros(count, len(X))
        for part, x in self._pieces(self.rows[:count], X):
            H += self._wide(part) @ x.T
        return torch.cat([self.U @ X.T, H])

    def _without(self, X: Tensor, inner: Tensor) -> Tensor:
        """Take from X, in its place, what U and the rows span, given its inner products with them."""
        m = len(inner)
        H = torch.cholesky_solve(inner.double().cpu(), torch.linalg.cholesky(self.G[:m, :m])).to(X)
        X.addmm_(H[: self.num_known].T, self.U, alpha=-1)
        H = H[self.num_known :]
        for part, x in self._pieces(self.rows[: len(H)], X):
            x -= H.T @ self._wide(part)
        return X

    def _orthonormalise(
        self, W: Tensor, count: int, *, least: float = 0.0, recent: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return N, R and the inner products of W with U and the rows."""
        del recent  # what rounding took from the rows couples W with all of them
        floor, H = floor_of(W, least), self._inner(W, count)
        N, R = gram_schmidt(self._without(W.clone(), H), floor)
        N, R_again = gram_schmidt(self._without(N, self._inner(N, count)), floor.new_tensor(dependent_share(W)))
        return N, R_again @ R, H
