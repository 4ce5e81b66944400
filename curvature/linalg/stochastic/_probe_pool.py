"""Random probes, their products, and an orthonormal basis made of some of these: what traces are estimated from.

Of k probes omega_i with products y_i = A omega_i the first s span, by their products, the range of an orthonormal Q
(n, r), whose own products Z = A Q are known too: k + r products in all. For any projector P that a probe has no part
in,

    tr(P A) + omega'(I - P) A (I - P) omega

is unbiased. For a probe beyond the first s, P = Q Q'. For one of the first s it is the same without the one direction
q_i = Q s_i that y_i brought in, orthogonal to all other products: every probe serves both purposes. With s = 0 this is
Hutchinson's estimator, with s = k XTrace, and without the samples of the first s Hutch++.

The leave-one-out estimates share their products and are correlated: their spread alone understates the error. Given all
probes but the j-th, the error e_j has mean zero; so with P made without both, e_i^(ij), which omega_j has no part in,

    Cov(t_i, t_j) = E[(t_i - t_i^(ij)) (t_j - t_j^(ij))],

the first factors being changes of estimates, free of the unknown trace. Leave-two-out estimates have closed forms too,
so the covariance, and with it the variance of the mean, is estimated without bias.

The small matrices W = Q'Omega, M = Q'Y, H = Q'Z and T = Omega'Z hold all that is needed. Probes on the sphere are
scaled back to it after the projection, which takes their length out of the variance (the improved variant of XTrace).

Reference: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.checkpoint import NOT_KEPT, Checkpoint
from curvature.linalg.base.deflation import deflated
from curvature.linalg.base.orthonormal import orthonormalise
from curvature.linalg.base.validate import (
    check_count,
    check_finite,
    check_range,
    check_square,
    working_dtype,
)
from curvature.linalg.stochastic.probes import DISTRIBUTIONS, one_direction
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs
from curvature.sharding.tensors import whole


class ProbePool:
    """Probes of one distribution, multiplied once and for all, of A without its `known` eigenpairs; see the module.

    Products are made `block_size` columns at a time. Without `keep` only the samples z'Az are held. A is replaced by
    what `deflated` returns for `deflate` and `definite`.
    """

    def __init__(
        self,
        A: MatrixLike,
        *,
        distribution: str,
        generator: AnyGenerator,
        deflate: EigenPairs | None = None,
        definite: bool = False,
        block_size: int = 1,
        keep: bool = True,
        callback: Callable[[int, str], None] | None = None,
        saved: Checkpoint = NOT_KEPT,
    ) -> None:
        self.n = check_square(A)
        check_count("block_size", block_size, 1)
        if distribution not in DISTRIBUTIONS:
            raise InputError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}.")
        self.distribution, self.generator = distribution, as_generator(generator, A.device)
        self.A, self.known = deflated(A, deflate, definite=definite)
        self.block_size, self.callback, self.keep, self.saved = block_size, callback, keep, saved
        empty = torch.empty(self.n, 0, dtype=working_dtype(A), device=A.device)
        self.probes, self.products = empty, empty
        """Omega and Y, (n, k)."""
        self.basis, self.images = empty, empty
        """Q and Z, (n, r)."""
        self.num_sketched = self.num_matvecs = 0
        """s: of how many probes the products are in the range of the basis; products so far."""
        self._energies = empty[0].double()
        self._first, self._alike = empty, True

    @property
    def num_probes(self) -> int:
        """How many probes there are, k."""
        return self.probes.shape[1] if self.keep else len(self._energies)

    @property
    def rank(self) -> int:
        """How many vectors the basis has, r."""
        return self.basis.shape[1]

    # -- products -----------------------------------------------------------------------------------------------------

    def add_probes(self, count: int) -> None:
        """Draw and multiply `count` more probes."""
        rest = count % self.block_size
        for width in [] if self.keep else [self.block_size] * (count // self.block_size) + [rest] * (rest > 0):
            X = self.draw(width)
            self._energies = torch.cat([self._energies, self._multiply(X, "probes", self._energies_of).double()])
            self._first = X[:, :1] if not self._first.numel() else self._first
            self._alike = self._alike and one_direction(torch.cat([self._first, X], dim=1))
        if count <= 0 or not self.keep:
            return
        X = self.draw(count)
        Y = self._multiply(X, "probes", self._products_of)
        self.probes = torch.cat([self.probes, X.to(Y)], dim=1)
        self.products = torch.cat([self.products, Y], dim=1)

    def draw(self, count: int) -> Tensor:
        """Return `count` new probes, (n, count), sharded where A's vectors are."""
        A, draw = self.A, DISTRIBUTIONS[self.distribution]
        sharding = getattr(A, "sharding", None)
        return draw(self.n, count, generator=self.generator, dtype=A.dtype, device=A.device, sharding=sharding)

    def alike(self, count: int) -> bool:
        """Return whether the last `count` probes are one vector up to sign, so that their samples tell no spread."""
        return one_direction(self.probes[:, self.num_probes - count :]) if self.keep else self._alike

    def sketch(self, upto: int) -> None:
        """Extend the basis by the products of the probes up to number `upto`: a product for each new direction."""
        if upto <= self.num_sketched:
            return
        self._extend(_new_directions(self.products[:, self.num_sketched : upto], self.basis))
        self.num_sketched = upto

    def drop_unsketched(self) -> None:
        """Forget the probes whose products are not in the basis: a choice made by looking at them biases them."""
        self.probes, self.products = self.probes[:, : self.num_sketched], self.products[:, : self.num_sketched]

    def complete(self) -> None:
        """Extend the basis to all of the space, so that everything about A is known: n - r products."""
        if self.rank == 0:
            self._extend(torch.eye(self.n, dtype=self.basis.dtype, device=self.basis.device))
        elif self.rank < self.n:
            self._extend(torch.linalg.qr(whole(self.basis), mode="complete")[0][:, self.rank :])

    def _extend(self, Q: Tensor) -> None:
        images = self._multiply(Q, "directions of the sketch", self._products_of)
        self.basis, self.images = torch.cat([self.basis, Q], dim=1), torch.cat([self.images, images], dim=1)

    def _products_of(self, X: Tensor) -> Tensor:
        return check_finite(self.A @ X.to(self.A.dtype), self.num_matvecs).to(self.basis.dtype)

    def _energies_of(self, X: Tensor) -> Tensor:
        return (X.to(self.basis) * self._products_of(X)).sum(dim=0)

    def _multiply(self, X: Tensor, what: str, of_block: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = []
        for block in X.split(self.block_size, dim=1):
            self.num_matvecs += block.shape[1]
            blocks.append(self.saved.piece(partial(of_block, block)))
            if self.callback is not None:
                self.callback(self.num_matvecs, what)
        products = torch.cat(blocks, dim=-1) if blocks else X
        first = self.num_probes + self.rank == 0
        return check_range(products, self.num_matvecs, first=first) if blocks and self.keep else products

    # -- what they tell -----------------------------------------------------------------------------------------------

    def trace_samples(self) -> tuple[Tensor, Tensor]:
        """Return one unbiased estimate of tr A a probe, (k,), and the sum of the covariances of all pairs of them, ().

        The first s are leave-one-out estimates; only among these are there covariances.
        """
        energies = (self.probes * self.products).sum(dim=0) if self.keep else self._energies
        if self.rank == 0:
            return energies, energies.new_zeros(())
        W, M, T = self.basis.T @ self.probes, self.basis.T @ self.products, self.images.T @ self.probes
        H = self.basis.T @ self.images
        S = self.left_out(M)
        plain = energies - (W * M).sum(dim=0) - (T * W).sum(dim=0) + (W * (H @ W)).sum(dim=0)
        L = M + T - (H + H.T) @ W  # omega'(I - P) A (I - P) omega = plain + d'L + d'H d for P omega = Q (W - d)
        SW, SL, SHS = S.T @ W, S.T @ L, S.T @ ((H + H.T) / 2) @ S
        own = (torch.linalg.vector_norm(S, dim=0) > 0).to(S)
        squares, room = self.n - W.square().sum(dim=0), self.n - self.rank

        p, h = SW.diagonal(), SHS.diagonal()
        rest = plain + p * SL.diagonal() + p.square() * h
        alone = H.trace() - h + rest * self._correction(room + own, squares + p.square())

        s = self.num_sketched
        i = slice(None), None  # the probe, against j, the other one that is left out
        plain, squares, p, h, own = plain[:s], squares[:s], p[:s], h[:s], own[:s]
        cosines, q, slopes = (S.T @ S)[:s, :s], SW.T[:s, :s], SL.T[:s, :s]
        sines = (1 - cosines.square()).clamp_min(torch.finfo(S.dtype).eps)
        a, b = (p[i] - cosines * q) / sines, (q - cosines * p[i]) / sines  # d = a s_i + b s_j: both projected on
        rest = plain[i] + a * slopes.diagonal()[i] + b * slopes  # and d'H d:
        rest = rest + a.square() * h[i] + 2 * a * b * SHS[:s, :s] + b.square() * h
        rest = rest * self._correction(room + own[i] + own, squares[i] + a * p[i] + b * q)
        both = H.trace() - (h[i] + h - 2 * cosines * SHS[:s, :s]) / sines + rest
        changes = (alone[:s, None] - both) * own[i] * own * (1 - torch.eye(s, dtype=S.dtype, device=S.device))
        return alone, (changes * changes.T).sum()

    def left_out(self, M: Tensor) -> Tensor:
        """Return the unit vectors s_i (r, k) that only y_i brought into the range, given M = Q'Y (r, k).

        Zero for a product that depends on the others, as all do when A has a rank below s.
        """
        s = self.num_sketched
        S = torch.zeros_like(M)
        if s == 0 or self.rank == self.n:
            return S
        inverse, leverage = _pseudo_inverse(M[:, :s])
        norms = torch.linalg.vector_norm(inverse, dim=1, keepdim=True)
        own = 1 - leverage[:, None] <= torch.finfo(M.dtype).eps ** 0.5
        S[:, :s] = torch.where(own & (norms > 0), inverse / norms, 0).T
        return S

    def _correction(self, dimensions: Tensor, squares: Tensor) -> Tensor | float:
        """Return what scales (I - P) omega of this squared length back to the sphere of these dimensions."""
        if self.distribution != "sphere":
            return 1.0
        rounding = self.n * torch.finfo(squares.dtype).eps
        return torch.where(squares > rounding, dimensions / squares.clamp_min(rounding), 0)


def _new_directions(X: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal columns that span X outside the basis; by one QR where the columns are clearly independent."""
    N = X / torch.linalg.vector_norm(X, dim=0).clamp_min(torch.finfo(X.dtype).tiny)
    Q, R = torch.linalg.qr(N - basis @ (basis.T @ N))
    if X.shape[1] > X.shape[0] or not bool(R.diagonal().abs().min() > 1e4 * torch.finfo(X.dtype).eps):
        return orthonormalise(X, basis)
    return torch.linalg.qr(Q - basis @ (basis.T @ Q)).Q


def _pseudo_inverse(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return M^+ (s, r) and, for every column of M, how much of its unit vector lies in the row space of M."""
    r, s = M.shape
    if r == s:  # upper triangular, since Q comes from Gram-Schmidt on these columns
        identity = torch.eye(r, dtype=M.dtype, device=M.device)
        return torch.linalg.solve_triangular(M.triu(), identity, upper=True), M.new_ones(s)
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = sigma > 10 * torch.finfo(M.dtype).eps * s * sigma[0] if len(sigma) else sigma > 0
    Vh, U = Vh * kept[:, None], U / torch.where(kept, sigma, 1)
    return Vh.T @ U.T, Vh.square().sum(dim=0)
