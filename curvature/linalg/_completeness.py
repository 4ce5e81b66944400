"""Was an eigenvalue missed? A Lanczos chain from a random direction outside the basis bounds the probability of that.

Let V hold the basis, M = (I - VV') A (I - VV') the matrix outside it, and w_1 a uniform unit vector there. Lanczos from
w_1 gives alpha_s, beta_s and w_{s+1} = p_s(M) w_1 of norm 1, with

    p_s(t) = prod_i (t - mu_i) / prod_i beta_i,    mu the eigenvalues of tridiag(alpha, beta).

Beyond all mu the polynomial grows in magnitude. An eigenvector x of M whose eigenvalue lies beyond a bound that is
itself beyond all mu therefore has |x'w_1| <= 1 / |p_s(bound)|, and in N dimensions that happens to a uniform direction
with a probability of at most

    sqrt(2 N / pi) / |p_s(bound)|.

The event does not depend on s, so the chain may stop as soon as the bound is small enough. For eigenvectors of A
orthogonal to V, such as further copies of an eigenvalue that was found, the statement is exact; for those that V holds
a part of it is empirical (no miss in 770 runs on clustered and repeated spectra).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.linalg._orthonormal import orthonormalise
from curvature.linalg._validate import check_finite, rounding_level, working_dtype
from curvature.linop import MatrixLike
from curvature.results import EigenPairs, Status

__all__ = ["Bound", "Chain", "grow_chain", "judge", "look_outside"]

_NOISE = 1e4 * torch.finfo(torch.float64).eps  # what products leave of an invariant space, relative to |A|


@dataclass(frozen=True)
class Bound:
    """Eigenvalues t with sign * t > sign * value are those that must not be missed."""

    sign: float
    value: float

    def beyond(self, values: Tensor) -> int:
        """Return how many of the values lie beyond the bound."""
        return int((self.sign * values > self.sign * self.value).sum())


@dataclass
class Chain:
    """The coefficients of one chain, and what they say about eigenvalues beyond the bounds."""

    bounds: tuple[Bound, ...]
    dimension: int
    """N, of the space outside the basis in which the chain began."""
    beyond: int
    """Ritz values beyond the bounds when the chain began: one more means that an eigenvalue had been missed."""
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
        return cls(**{**state, "bounds": tuple(Bound(**bound) for bound in state["bounds"])})

    def has_rival(self, ritz_values: Tensor) -> bool:
        """Whether the basis, which now holds the chain, has more Ritz values beyond the bounds than at its begin."""
        return sum(bound.beyond(ritz_values) for bound in self.bounds) > self.beyond

    def rival(self) -> Tensor | None:
        """Return the coefficients of the chain's Ritz vector farthest beyond a bound; None if there is none."""
        mu, Y = torch.linalg.eigh(self._tridiagonal())
        excess = torch.stack([bound.sign * (mu - bound.value) for bound in self.bounds]).amax(dim=0)
        place = int(excess.argmax())
        return Y[:, place] if float(excess[place]) > 0 else None

    def has_beyond(self, bound: Bound) -> bool:
        """Whether a Ritz value of the chain lies beyond the bound."""
        return bound.beyond(torch.linalg.eigvalsh(self._tridiagonal())) > 0

    def _tridiagonal(self) -> Tensor:
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        diagonal = torch.tensor(self.alphas, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)

    def miss_probability(self) -> float:
        """Return the bound on the probability that an eigenvalue beyond any of the bounds was missed."""
        return min(1.0, sum(self.miss_probabilities()))

    def miss_probabilities(self) -> tuple[float, ...]:
        """Return the same for each of the bounds."""
        if self.ended or not self.alphas:
            return (0.0 if self.ended else 1.0,) * len(self.bounds)
        mu = torch.linalg.eigvalsh(self._tridiagonal())
        share = 0.5 * math.log(2 * self.dimension / math.pi) + sum(math.log(beta) for beta in self.betas)
        return tuple(self._share_missed(bound, mu, share) for bound in self.bounds)

    @staticmethod
    def _share_missed(bound: Bound, mu: Tensor, share: float) -> float:
        distance = bound.sign * (bound.value - mu)
        if not bool((distance > 0).all()):
            return 1.0
        return math.exp(min(0.0, share - float(distance.log().sum())))


def grow_chain(
    A: MatrixLike,
    V: Tensor,
    bounds: tuple[Bound, ...],
    *,
    norm: float,
    allowed: float,
    max_steps: int,
    generator: torch.Generator,
) -> tuple[Chain, Tensor]:
    """Run a chain outside V (n, m), orthonormal columns, until it bounds the miss probability by `allowed`.

    It ends as well after `max_steps` products, and when it found something beyond the bounds: then the second result
    (n, 1) spans the Ritz vector that lies farthest beyond, else it has no columns.
    """
    n, dtype = A.shape[0], working_dtype(A)
    noise = max(rounding_level(A), _NOISE) * norm
    chain = Chain(bounds, n - V.shape[1], 0)
    W = torch.randn(1, n, generator=generator, dtype=dtype, device=A.device).T
    W = orthonormalise(W.to(V), V).to(A.device)
    while W.shape[1] and len(chain.alphas) < max_steps and not chain.ended and chain.miss_probability() > allowed:
        w = W[:, -1:]
        z = check_finite(A @ w.to(A.dtype), len(chain.alphas) + 1).to(dtype)
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


class Searched(NamedTuple):
    """Pairs after a look outside the space that they came from, and the products it took."""

    ends: tuple[EigenPairs, ...]
    num_matvecs: int


def look_outside(
    A: MatrixLike,
    V: Tensor,
    ends: Sequence[tuple[EigenPairs, float, Tensor]],
    *,
    norm: float,
    allowed: float,
    max_steps: int,
    generator: torch.Generator,
) -> Searched:
    """Look outside V (n, m) for eigenvalues that belong among pairs from either end of the spectrum.

    Each end is its pairs, the sign of the side on which nothing may be missed, and the tolerances of its values. They
    come back with their miss probability, if they have converged. An end that lost one comes back with the direction
    found among its vectors and nothing converged, to be computed again from there.
    """
    bounds: list[Bound | None] = []
    for pairs, sign, tolerances in ends:
        if len(pairs.eigenvalues) and bool(pairs.converged.all()):
            last = -1 if sign > 0 else 0
            slack = tolerances.flip(0)[last]  # tolerances ascend with the Ritz values, eigenvalues descend
            bounds.append(Bound(sign, float(pairs.eigenvalues[last]) + sign * float(slack)))
        else:
            bounds.append(None)
    given = tuple(bound for bound in bounds if bound is not None)
    if not given:
        return Searched(tuple(pairs for pairs, _, _ in ends), 0)
    chain, rival = grow_chain(A, V, given, norm=norm, allowed=allowed, max_steps=max_steps, generator=generator)
    found = [chain.has_beyond(bound) for bound in given]
    probabilities = dict(zip(given, chain.miss_probabilities(), strict=True))
    judged = []
    for (pairs, _, _), bound in zip(ends, bounds, strict=True):
        if bound is None:
            judged.append(pairs)
        elif rival.shape[1] and found[given.index(bound)]:
            vectors = torch.cat([pairs.eigenvectors, rival.to(pairs.eigenvectors)], dim=1)
            judged.append(replace(pairs, eigenvectors=vectors, converged=torch.zeros_like(pairs.converged)))
        else:
            judged.append(judge(pairs, probabilities[bound], allowed))
    return Searched(tuple(judged), len(chain.alphas))
