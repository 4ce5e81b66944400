"""Extreme eigenpairs of a symmetric matrix by LOBPCG: block Rayleigh-Ritz on [X, P, W], with a preconditioner.

X holds the current Ritz vectors, W their preconditioned residuals, P what the last step added to X. The three are kept
orthonormal as one block S; A S is carried along by linear combination, so that a step multiplies W only, and of W only
the columns whose pairs have not converged. For a matrix that changes little, a start from its old eigenvectors needs a
handful of products. Without a preconditioner `eigsh` converges faster from a random start.

Reference: Knyazev (2001), Toward the optimal preconditioned eigensolver; Duersch, Shao, Yang and Gu (2018), A robust
and efficient implementation of LOBPCG.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.orthonormal import orthonormalise
from curvature.linalg.base.validate import (
    check_confidence,
    check_count,
    check_finite,
    check_range,
    check_square,
    check_start,
    check_tolerances,
    leaving_room,
    product_noise,
    rounding_level,
    with_noise,
    working_dtype,
)
from curvature.linalg.krylov._completeness import Bound, grow_chain
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.results.estimates import EigenPairs, Status

_CHAIN = 20  # products that a chain may take in any case; beyond, no more than the iteration took


@numerics
def lobpcg(
    A: AnyMatrix,
    k: int,
    *,
    matrix: MatrixName = "hessian",
    which: Literal["LA", "SA"] = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    generator: AnyGenerator,
    preconditioner: MatrixLike | None = None,
    certify: bool = False,
    confidence: float | None = 0.99,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    A start close to eigenvectors that have since been overtaken converges to those. When all pairs have converged, a
    Lanczos chain from a random direction outside them therefore looks for what was missed, as in `eigsh`; what it finds
    joins the iteration.

    Cost: a product for each start vector, then for each pair that has not converged in every step, then some 5 to 15
    for the chain, at most 20 or as many as were spent. Where that does not do, as at the low end of ill-conditioned
    matrices, for which the chain has no preconditioner, the status is UNCERTIFIED. Memory: 6 vectors a column of v0,
    and their images while they are combined; those of the chain.

    Arguments are those of `eigsh`, `which` "LA" or "SA". Columns of v0 beyond k are iterated too, which helps where the
    k-th eigenvalue is close to the next; default: k random columns.

    Returns:
        Eigenpairs, eigenvalues descending. With a status other than CONVERGED, the best that was reached.

    Examples:
        >>> A = torch.diag(torch.arange(100.0))
        >>> g = torch.Generator().manual_seed(0)
        >>> old = lobpcg(A, 2, generator=g)
        >>> new = lobpcg(A + 0.1 * torch.eye(100), 2, generator=g, v0=old.eigenvectors, confidence=None)
        >>> new.status.name, new.num_matvecs
        ('CONVERGED', 2)
    """
    A = as_matrix(A, matrix)
    n = check_square(A)
    generator = as_generator(generator, A.device)
    check_count("k", k, 1, n)
    check_tolerances(rtol, atol)
    check_confidence(confidence)
    if which not in ("LA", "SA"):
        raise InputError(f"which must be one of LA, SA, got {which!r}; for the others take eigsh.")
    if preconditioner is not None and tuple(preconditioner.shape) != (n, n):
        raise InputError(f"preconditioner must have shape ({n}, {n}), got {tuple(preconditioner.shape)}.")
    X = check_start(A, v0, k, generator)
    reserved = k if certify else 0
    limit = (max(10 * n, 1000) if max_matvecs is None else max_matvecs) - reserved
    if limit < X.shape[1]:
        raise InputError(
            f"max_matvecs must be at least {X.shape[1] + reserved}, to multiply the start once, got {max_matvecs}."
        )
    iteration = _Iteration(A, X, 1.0 if which == "SA" else -1.0, generator)
    search = _Search(iteration, k, confidence)
    while True:
        tolerance = (rtol * iteration.theta.abs()).clamp_min(max(atol, iteration.rounding()))
        R, norms = iteration.residuals()
        is_open = norms > leaving_room(A, tolerance, iteration.norm)
        num_open = int(is_open[:k].sum())
        if callback is not None:
            callback(iteration.num_matvecs, f"{k - num_open} of {k} eigenpairs")
        left = limit - iteration.num_matvecs
        if num_open == 0 and not iteration.stuck and left > 0 and search.found_more(float(tolerance[k - 1]), left):
            continue
        places = is_open.nonzero()[:, 0][:left]
        if num_open == 0 or len(places) == 0 or iteration.stuck:
            break
        W = R[:, places.to(R.device)]
        iteration.step(W if preconditioner is None else (preconditioner @ W.to(preconditioner.dtype)).to(W))
    return _result(iteration, k, rtol, tolerance[:k], norms[:k], certify, search)


class _Search:
    """Whether pairs were missed, by one chain after the other until one finds nothing."""

    def __init__(self, iteration: _Iteration, k: int, confidence: float | None) -> None:
        self.iteration, self.k, self.confidence = iteration, k, confidence
        self.num_chains, self.miss_probability = 0, math.nan if confidence is None else 1.0

    @property
    def passed(self) -> bool:
        """Whether it was shown that nothing was missed; or nobody asked."""
        return self.confidence is None or self.miss_probability <= 1 - self.confidence

    def found_more(self, tolerance: float, max_steps: int) -> bool:
        """Look for values beyond the k-th; take what is found into the iteration."""
        iteration = self.iteration
        if self.confidence is None:
            return False
        if iteration.width == iteration.A.shape[0]:
            self.miss_probability = 0.0
            return False
        self.num_chains += 1
        allowed = (1 - self.confidence) / (self.num_chains * (self.num_chains + 1))
        sign = iteration.sign
        bound = Bound(-sign, sign * (float(iteration.theta[self.k - 1]) - tolerance))
        R = iteration.residuals()[0][:, self.k :]
        chain, rival = grow_chain(
            iteration.A,
            iteration.X,
            bound,
            (R, (1 / (bound.value - sign * iteration.theta[self.k :])).diag()),
            norm=iteration.norm,
            allowed=allowed,
            max_steps=min(max_steps, max(_CHAIN, iteration.num_matvecs)),
            generator=iteration.generator,
        )
        iteration.num_matvecs += len(chain.alphas)
        spent = sum((1 - self.confidence) / (i * (i + 1)) for i in range(1, self.num_chains))
        self.miss_probability = min(1.0, spent + chain.miss_probability()) if not rival.shape[1] else 1.0
        if rival.shape[1] and len(chain.alphas) < max_steps:
            iteration.step(rival)
            return True
        return False


class _Iteration:
    """X, P and their images, for sign * A, so that the smallest are wanted; theta ascending, float64 on the CPU."""

    def __init__(self, A: MatrixLike, X: Tensor, sign: float, generator: torch.Generator) -> None:
        self.A, self.sign, self.generator = A, sign, generator
        self.dtype = working_dtype(A)
        self.num_matvecs, self.norm, self.stuck = 0, 0.0, False
        self.width = X.shape[1]
        self.X, self.AX = X.new_zeros(len(X), 0), X.new_zeros(len(X), 0)
        self.P, self.AP = self.X, self.AX
        self.step(X)

    def rounding(self) -> float:
        return rounding_level(self.A) * self.norm

    def residuals(self) -> tuple[Tensor, Tensor]:
        R = self.AX - self.X * self.theta.to(self.X)
        return R, torch.linalg.vector_norm(R, dim=0).double().cpu()

    def _multiply(self, W: Tensor) -> Tensor:
        return check_range(self.A @ W.to(self.A.dtype), self.num_matvecs, first=self.norm == 0).to(W)

    def step(self, W: Tensor) -> None:
        """Rayleigh-Ritz on [X, P, W]; products with W only."""
        held = torch.cat([self.X, self.P], dim=1)
        width = min(W.shape[1], len(W) - held.shape[1])
        W = orthonormalise(W, held)[:, :width]
        if W.shape[1] < (min(width, 1) if held.shape[1] else width):  # a dependent start, or residuals of nothing
            fill = torch.randn(len(W), width - W.shape[1], generator=self.generator, dtype=W.dtype, device=W.device)
            W = torch.cat([W, orthonormalise(fill, torch.cat([held, W], dim=1))], dim=1)
        self.stuck = width == 0  # X and P span the whole space: what residuals are left is rounding
        S = torch.cat([held, W], dim=1)
        self.num_matvecs += W.shape[1]
        AW = self.sign * self._multiply(W) if width else W
        AS = torch.cat([self.AX, self.AP, AW], dim=1)
        T = (S.T @ AS).double().cpu()
        self.theta, C = torch.linalg.eigh((T + T.T) / 2)
        self.norm = max(self.norm, float(self.theta.abs().max()))
        self.theta, C = self.theta[: self.width], C[:, : self.width]
        D = C.clone()
        D[: self.X.shape[1]] = 0  # what the step added to X ...
        D = orthonormalise(D, C) if self.X.shape[1] else D[:, :0]  # ... orthogonal to the new X, in coefficients
        C, D = C.to(S), D.to(S)
        self.X, self.AX, self.P, self.AP = S @ C, AS @ C, S @ D, AS @ D


def _result(
    iteration: _Iteration, k: int, rtol: float, tolerance: Tensor, norms: Tensor, certify: bool, search: _Search
) -> EigenPairs:
    A, X, values = iteration.A, iteration.X[:, :k], iteration.theta[:k]
    status = Status.STAGNATED if iteration.stuck else Status.MAX_MATVECS
    status = Status.CONVERGED if bool((norms <= tolerance).all()) else status
    norms = norms.clamp_min(iteration.rounding())
    if certify:
        AX = iteration.sign * check_finite(A @ X.to(A.dtype), iteration.num_matvecs + k).to(X)
        norms = torch.linalg.vector_norm(AX - X * values.to(X), dim=0).double().cpu()
    norms, is_noisy = with_noise(A, norms, iteration.norm)
    converged = norms <= tolerance
    if status is Status.CONVERGED and not bool(converged.all()):
        status = Status.WITHIN_NOISE if is_noisy else Status.STAGNATED
    elif status is Status.CONVERGED and not search.passed:
        status = Status.UNCERTIFIED
    values = iteration.sign * values
    order = values.argsort(descending=True)
    return EigenPairs(
        eigenvalues=values[order].to(X),
        eigenvectors=X[:, order.to(X.device)],
        residual_norms=norms[order].to(X),
        converged=converged[order].to(A.device),
        num_matvecs=iteration.num_matvecs + (k if certify else 0),
        status=status,
        rtol=rtol,
        miss_probability=search.miss_probability,
        product_noise=product_noise(A) or None,
    )
