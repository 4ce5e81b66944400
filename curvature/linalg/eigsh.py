"""Some eigenpairs of a symmetric matrix by thick-restart Lanczos, in bounded memory.

The basis V is orthonormal, T = V'AV is kept whole, and the residual of the basis is held as a few further orthonormal
directions P with coefficients C:

    A V = V T + P C,    V'P = 0.

A Ritz pair (theta, V s) therefore has the residual norm |C s|, through restarts and for start blocks of any width. A
step multiplies the direction of P that carries most of the wanted pairs' residuals; a restart keeps the best Ritz
vectors. When P vanishes, V spans an invariant space, and a random direction orthogonal to it is tried, so that
repeated eigenvalues are found as often as they are there.

Reference: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems; Stewart (2001), A
Krylov-Schur algorithm for large eigenproblems. Differs from ARPACK in that convergence is looked at after every
product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg._validate import check_count, check_finite, check_generator, check_square, working_dtype
from curvature.linop import MatrixLike
from curvature.results import EigenPairs, Status

__all__ = ["eigsh"]

Which = Literal["LA", "SA", "LM", "BE"]


def eigsh(
    A: MatrixLike,
    k: int,
    *,
    which: Which = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    generator: torch.Generator,
    num_basis: int | None = None,
    block_size: int = 1,
    certify: bool = False,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    The tolerance has a floor at rounding, 10 eps |A|, so that zero eigenvalues converge too. Eigenvalues that are small
    beside |A|, as at the low end of a Hessian's spectrum, want an `atol`: relative to themselves they cost dearly. An
    eigenvalue that is repeated more than `block_size` times is sure to be found in full only if its Krylov space is
    exhausted; clusters that are merely close are no problem.

    Cost: one product a step, 20 to 80 for the top of a typical Hessian; 4 n m operations a step for the basis. Memory:
    `num_basis` + `block_size` vectors.

    Args:
        A: symmetric, (n, n).
        k: number of pairs, in [1, n].
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" k // 2 from the low end and the
            rest from the high end.
        rtol: tolerance of the residuals relative to the eigenvalue; positive.
        atol: tolerance of the residuals in units of A, where that is larger.
        max_matvecs: most products to spend. Default: 10 n, at least 1000.
        v0: start vector (n,) or block (n, p), e.g. the eigenvectors of a nearby matrix. Default: random.
        generator: for the start and for directions after a breakdown; on A's device.
        num_basis: vectors held, more than k + block_size. Default: max(2 k + 1, 20), or more for a wide start block.
        block_size: columns a product takes.
        certify: multiply the pairs once more at the end, k products, and report residuals that were computed, not
            inferred from the recurrence.
        callback: called after each product with the products so far and a word on progress.

    Returns:
        Eigenpairs, eigenvalues descending. With status MAX_MATVECS or STAGNATED, the best that was reached.

    Raises:
        InputError: for arguments out of range.
        NonFiniteError: if a product is not finite.
    """
    n = check_square(A)
    _validate(A, n, k, which, rtol, atol, max_matvecs, num_basis, block_size, v0)
    check_generator(A, generator)
    start_size = block_size if v0 is None else v0.reshape(n, -1).shape[1]
    size = min(n, max(2 * k + 1, 20, k + 2 * block_size, start_size + block_size) if num_basis is None else num_basis)
    limit = max(10 * n, 1000) if max_matvecs is None else max_matvecs
    space = _Space(A, size, generator)
    space.start(torch.randn(block_size, n, generator=generator, device=A.device) if v0 is None else v0.reshape(n, -1).T)
    settled: Tensor | None = None  # wanted eigenvalues before a random direction was tried
    while True:
        width = block_size if space.count else start_size  # the whole start block at once
        width = min(width, limit - space.num_matvecs, n - space.count, size - space.count)
        trying = space.step(max(width, 1))
        theta, S, residuals = space.ritz()
        wanted = _wanted(theta, k, which)
        tolerance = (rtol * theta[wanted].abs()).clamp_min(max(atol, space.rounding()))
        done = residuals[wanted] <= tolerance
        if callback is not None:
            callback(space.num_matvecs, f"{int(done.sum())} of {k} eigenpairs")
        converged = len(wanted) == k and bool(done.all())
        if converged and (not space.exhausted() or (trying and _alike(settled, theta[wanted], space.rounding()))):
            break
        settled = theta[wanted]
        if space.count == n or space.num_matvecs >= limit:
            break
        if space.count >= size:
            space.restart(S[:, _wanted(theta, _num_kept(k, size, block_size), which)])
    status = Status.CONVERGED if converged else Status.MAX_MATVECS
    return _result(A, space, theta, S, residuals, wanted.flip(0), (rtol, atol), status, certify)


class _Space:
    """The basis V and residual directions P, as rows, with T = V'AV and C = P'AV in float64 on the CPU."""

    def __init__(self, A: MatrixLike, size: int, generator: torch.Generator) -> None:
        self.A, self.generator = A, generator
        self.dtype = working_dtype(A)
        self.n = A.shape[0]
        self.V = torch.empty(size, self.n, dtype=self.dtype, device=A.device)
        self.P = self.V.new_empty(0, self.n)
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.C = torch.zeros(0, 0, dtype=torch.float64)
        self.num_matvecs = 0
        self.norm = 0.0

    @property
    def count(self) -> int:
        return self.T.shape[0]

    def rounding(self) -> float:
        """Residual norms below this are rounding."""
        return 10 * torch.finfo(self.dtype).eps * self.norm

    def exhausted(self) -> bool:
        """Whether V is invariant to rounding: what comes next is a random direction."""
        return self.C.numel() == 0 or bool(torch.linalg.matrix_norm(self.C) <= self.rounding())

    def start(self, X: Tensor) -> None:
        self.P, _ = self._orthonormalise(X.to(self.V), self.V[:0])
        self.C = torch.zeros(len(self.P), 0, dtype=torch.float64)

    def step(self, width: int) -> bool:
        """Move `width` directions from P to V, by products with them; say whether they were random ones."""
        random = self.count > 0 and self.exhausted()
        if random:
            self._randomise(width)
        elif self.count > 0 and len(self.P) > width:
            self._sort_directions()
        width = min(width, len(self.P))
        Q, P, C = self.P[:width], self.P[width:], self.C
        W = (self.A @ Q.T.to(self.A.dtype)).T.to(self.dtype)
        self.num_matvecs += width
        check_finite(W, self.num_matvecs)
        old, new = self.count, self.count + width
        self.V[old:new] = Q
        V = self.V[:new]
        H = V @ W.T  # (new, width)
        W = W - H.T @ V
        G = P @ W.T
        W = W - G.T @ P
        N, R = self._orthonormalise(W, torch.cat([V, P]))
        T = torch.zeros(new, new, dtype=torch.float64)
        H = H.double().cpu()
        T[:old, :old], T[:, old:], T[old:, :old] = self.T, H, H[:old].T
        T[old:, old:] = (H[old:] + H[old:].T) / 2
        self.T, self.P = T, torch.cat([P, N])
        self.C = torch.zeros(len(self.P), new, dtype=torch.float64)
        self.C[: len(P), :old], self.C[: len(P), old:], self.C[len(P) :, old:] = (
            C[width:],
            G.double().cpu(),
            R.double().cpu(),
        )
        self.norm = max(self.norm, float(torch.linalg.matrix_norm(H, 2)))
        return random

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, ascending, their coefficients in V, and their residual norms."""
        theta, S = torch.linalg.eigh(self.T)
        residuals = (self.C @ S).norm(dim=0) if len(self.C) else torch.zeros_like(theta)
        return theta, S, residuals

    def restart(self, S: Tensor) -> None:
        """Keep V S only."""
        kept = S.shape[1]
        self.V[:kept] = S.T.to(self.V) @ self.V[: self.count]
        self.T, self.C = S.T @ self.T @ S, self.C @ S

    def vectors(self, S: Tensor) -> Tensor:
        return self.V[: self.count].T @ S.to(self.V)

    def _sort_directions(self) -> None:
        """Rotate P so that its first directions carry most of the residuals, and drop those that carry none."""
        U, s, _ = torch.linalg.svd(self.C)
        U = U[:, : int((s > self.rounding()).sum())]
        self.P, self.C = U.T.to(self.P) @ self.P, U.T @ self.C

    def _randomise(self, width: int) -> None:
        X = torch.randn(width, self.n, generator=self.generator, dtype=self.dtype, device=self.V.device)
        self.P, _ = self._orthonormalise(X, self.V[: self.count])
        self.C = torch.zeros(len(self.P), self.count, dtype=torch.float64)

    def _orthonormalise(self, X: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return orthonormal rows N, orthogonal to the basis, and R with X = R'N + part in the basis; no null rows."""
        rows: list[Tensor] = []
        R = torch.zeros(len(X), len(X), dtype=X.dtype, device=X.device)
        floor = torch.finfo(X.dtype).eps * self.n**0.5
        for j, x in enumerate(X):
            size = x.norm()
            for _ in range(2):  # twice is enough
                x = x - basis.T @ (basis @ x)
                for i, row in enumerate(rows):
                    h = row @ x
                    R[i, j] += h
                    x = x - h * row
            norm = x.norm()
            if bool(norm > floor * torch.clamp(size, min=self.norm)) and len(basis) + len(rows) < self.n:
                R[len(rows), j] = norm
                rows.append(x / norm)
        return (torch.stack(rows) if rows else X[:0]), R[: len(rows)]


def _wanted(theta: Tensor, k: int, which: Which) -> Tensor:
    """Return the places of the k wanted among ascending Ritz values, ascending."""
    m = len(theta)
    k = min(k, m)
    if which == "LA":
        return torch.arange(m - k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LM":
        return theta.abs().argsort(descending=True)[:k].sort().values
    return torch.cat([torch.arange(k // 2), torch.arange(m - (k - k // 2), m)])


def _num_kept(k: int, size: int, block_size: int) -> int:
    """Return how many Ritz vectors survive a restart: the wanted ones and a good part of the room beside them."""
    return max(1, min(k + (size - k) // 2, size - block_size))


def _alike(before: Tensor | None, now: Tensor, rounding: float) -> bool:
    return before is not None and len(before) == len(now) and bool((before - now).abs().max() <= 10 * rounding)


def _result(
    A: MatrixLike,
    space: _Space,
    theta: Tensor,
    S: Tensor,
    residuals: Tensor,
    order: Tensor,
    tolerances: tuple[float, float],
    status: Status,
    certify: bool,
) -> EigenPairs:
    values, U = theta[order], space.vectors(S[:, order])
    norms = residuals[order].clamp_min(space.rounding())
    if certify:
        R = (A @ U.to(A.dtype)).to(space.dtype) - U * values.to(U)
        norms = R.norm(dim=0).double().cpu()
        space.num_matvecs += len(values)
    rtol, atol = tolerances
    converged = norms <= (rtol * values.abs()).clamp_min(max(atol, space.rounding()))
    if status is Status.CONVERGED and not bool(converged.all()):
        status = Status.STAGNATED
    return EigenPairs(
        eigenvalues=values.to(U),
        eigenvectors=U,
        residual_norms=norms.to(U),
        converged=converged.to(A.device),
        num_matvecs=space.num_matvecs,
        status=status,
        rtol=rtol,
    )


def _validate(
    A: MatrixLike,
    n: int,
    k: int,
    which: str,
    rtol: float,
    atol: float,
    max_matvecs: int | None,
    num_basis: int | None,
    block_size: int,
    v0: Tensor | None,
) -> None:
    check_count("k", k, 1, n)
    check_count("block_size", block_size, 1, n)
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}.")
    if which == "BE" and k < 2:
        raise InputError("which='BE' asks for pairs of both ends: k must be at least 2, got 1.")
    if not rtol > 0 or not atol >= 0:
        raise InputError(f"rtol must be positive and atol not negative, got {rtol} and {atol}.")
    if max_matvecs is not None:
        check_count("max_matvecs", max_matvecs, 1)
    if num_basis is not None and num_basis < min(n, k + block_size + 1):
        raise InputError(f"num_basis must be at least k + block_size + 1 = {k + block_size + 1}, got {num_basis}.")
    if v0 is not None and (v0.ndim not in (1, 2) or v0.shape[0] != n or v0.numel() == 0):
        raise InputError(f"v0 must be a vector ({n},) or a block ({n}, p), got shape {tuple(v0.shape)}.")
    if v0 is not None and (v0.device != A.device or not bool(torch.isfinite(v0).all()) or not bool(v0.any())):
        raise InputError(f"v0 must be finite, not zero, and on the device of A ({A.device}).")
