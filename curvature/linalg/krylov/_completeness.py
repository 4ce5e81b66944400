"""Was an eigenvalue missed? A Lanczos chain from a random direction outside the basis bounds the probability of that.

Let V hold the basis, T = V'AV, R = (I - VV') A V, and let no eigenvalue of T be equal to the bound b. By Haynsworth's
inertia additivity A has as many eigenvalues beyond b as T and the Schur complement

    S = (I - VV') A (I - VV') + R (b - T)^-1 R'    on the complement of V, of dimension N

have beyond b together. So nothing was missed if S has none there. Lanczos on S from a uniform unit vector w_1 of the
complement gives alpha_s, beta_s and w_{s+1} = p_s(S) w_1 of norm 1, with

    p_s(t) = prod_i (t - mu_i) / prod_i beta_i,    mu the eigenvalues of tridiag(alpha, beta).

If a mu lies beyond b, something was missed. Else the polynomial grows in magnitude from b on, so that an eigenvector x
of S beyond b has |x'w_1| <= 1 / |p_s(b)|, which happens to a uniform direction with a probability of at most

    sqrt(2 N / pi) / |p_s(b)|.

The event does not depend on s, so the chain may stop as soon as the bound is small enough. R is of low rank and known:
a step costs one product with A. The residuals of pairs that have converged are left out of R: the statement is exact
for a matrix that has these as its eigenpairs, and differs from A by no more than those residuals.

Reference: Haynsworth (1968), Determination of the inertia of a partitioned Hermitian matrix; Parlett (1998), The
symmetric eigenvalue problem, for Lanczos polynomials.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvature.linalg.base.orthonormal import orthonormalise
from curvature.linalg.base.places import normal_rows
from curvature.linalg.base.validate import check_finite, rounding_level, working_dtype
from curvature.linalg.krylov._ritz_selection import Which
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs, Status

_NOISE = 1e4 * torch.finfo(torch.float64).eps  # what products leave of an invariant space, relative to |A|


@dataclass(frozen=True)
class Bound:
    """Eigenvalues t with sign * t > sign * value are those that must not be missed."""

    sign: float
    value: float

    def beyond(self, values: Tensor) -> int:
        """Return how many of the values lie beyond the bound."""
        return int((self.sign * values > self.sign * self.value).sum())

    def distance(self, values: Tensor) -> float:
        """Return how far the nearest of the values inside lies from the bound."""
        gaps = self.sign * (self.value - values)
        return float(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else math.inf


def bounds_of(values: Tensor, which: Which, slack: Tensor) -> tuple[Bound, ...]:
    """Return the ends beyond which none may be missed: the last of the wanted values, ascending, and their slack."""
    if which == "LA":
        return (Bound(1.0, float(values[0] + slack[0])),)
    if which == "SA":
        return (Bound(-1.0, float(values[-1] - slack[-1])),)
    if which == "LM":
        last = int(values.abs().argmin())
        magnitude = float(values[last].abs() + slack[last])
        return Bound(1.0, magnitude), Bound(-1.0, -magnitude)
    low, high = len(values) // 2 - 1, len(values) // 2
    return Bound(1.0, float(values[high] + slack[high])), Bound(-1.0, float(values[low] - slack[low]))


@dataclass
class Chain:
    """The coefficients of one chain, and what they say about eigenvalues beyond the bound."""

    bound: Bound
    dimension: int
    """N, of the space outside the basis in which the chain began."""
    far: Bound | None = None
    """A bound at the other end: one for S here, and so for that end's own Schur complement, which is close."""
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    ended: bool = False
    """Whether the chain spans an invariant space: nothing else is reached from its start."""

    def add(self, alpha: float, beta: float, noise: float) -> None:
        """Note one step; `noise` is what products leave of an invariant space."""
        self.alphas.append(alpha)
        self.betas.append(beta)
        self.ended = not beta > noise

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Chain:
        """Return the chain whose `state_dict` this is."""
        bounds = {name: state[name] and Bound(**state[name]) for name in ("bound", "far")}
        return cls(**{**state, **bounds})

    def rival(self) -> Tensor | None:
        """Return the coefficients of the chain's Ritz vector farthest beyond the bound; None if there is none."""
        mu, Y = torch.linalg.eigh(self._tridiagonal())
        place = int((self.bound.sign * mu).argmax())
        return Y[:, place] if self.bound.beyond(mu) else None

    def _tridiagonal(self) -> Tensor:
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        diagonal = torch.tensor(self.alphas, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)

    def miss_probability_of_all(self) -> float:
        """Return the bound on the probability that one at either end was missed; 1 where the far end is not known."""
        return 1.0 if self.far is None else min(1.0, self.miss_probability() + self.miss_probability(self.far))

    def miss_probability(self, at: Bound | None = None) -> float:
        """Return the bound on the probability that an eigenvalue beyond the bound was missed."""
        bound = self.bound if at is None else at
        if not self.alphas:
            return 1.0
        mu = torch.linalg.eigvalsh(self._tridiagonal())
        if self.ended:
            return float(bound.beyond(mu) > 0)
        distance = bound.sign * (bound.value - mu)
        if not bool((distance > 0).all()):
            return 1.0
        share = 0.5 * math.log(2 * self.dimension / math.pi) + sum(math.log(beta) for beta in self.betas)
        return math.exp(min(0.0, share - float(distance.log().sum())))


def grow_chain(
    A: MatrixLike,
    V: Tensor,
    bound: Bound,
    correction: tuple[Tensor, Tensor],
    *,
    norm: float,
    allowed: float,
    max_steps: int,
    generator: torch.Generator,
) -> tuple[Chain, Tensor]:
    """Run a chain outside V (n, m), orthonormal columns, until it bounds the miss probability by `allowed`.

    `correction` holds F (n, d), orthogonal to V, and K (d, d) with F K F' = R (b - T)^-1 R'. The chain ends as well
    after `max_steps` products, and when it found something beyond the bound: then the second result (n, 1) spans the
    Ritz vector that lies farthest beyond, else it has no columns.
    """
    n, dtype, (F, K) = A.shape[0], working_dtype(A), correction
    noise = max(rounding_level(A), _NOISE) * norm
    chain = Chain(bound, n - V.shape[1])
    W = normal_rows(A, 1, generator).T
    W = orthonormalise(W.to(V), V).to(A.device)
    while W.shape[1] and len(chain.alphas) < max_steps and not chain.ended and chain.miss_probability() > allowed:
        w = W[:, -1:]
        z = check_finite(A @ w.to(A.dtype), len(chain.alphas) + 1).to(dtype)
        z = z + (F @ (K.to(F) @ (F.T @ w.to(F)))).to(z)
        alpha = float((w * z).sum())
        for _ in range(2):
            for basis in (V, W):
                z = z - (basis @ (basis.T @ z.to(basis))).to(z)
        beta = float(torch.linalg.vector_norm(z))
        chain.add(alpha, beta, noise)
        found = chain.rival()
        if found is not None:
            return chain, W @ found[:, None].to(W)
        W = W if chain.ended else torch.cat([W, z / beta], dim=1)
    return chain, W[:, :0]


def judge(pairs: EigenPairs, miss_probability: float, allowed: float) -> EigenPairs:
    """Return the pairs with their miss probability, UNCERTIFIED if it is too large; NaN stands for not asked."""
    unsure = pairs.status.ok and miss_probability > allowed
    status = Status.UNCERTIFIED if unsure else pairs.status
    return replace(pairs, miss_probability=miss_probability, status=status)
