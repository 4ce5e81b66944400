"""Thick-restart Lanczos as an object: to be run for a while, saved, and run on.

Every step multiplies a few residual directions and looks at the Ritz pairs; when the basis is full, the best Ritz
vectors are kept and the rest dropped. When the basis spans an invariant space, a random direction orthogonal to it is
tried, so that repeated eigenvalues are found as often as they are there.

Reference: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems; Stewart (2001), A
Krylov-Schur algorithm for large eigenproblems. Differs from ARPACK in that convergence is looked at after every
product, start blocks may have any width, and residuals are those of the pairs returned, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg._krylov_space import KrylovSpace
from curvature.linalg._orthonormal import orthonormalise
from curvature.linalg._rounded_space import RoundedSpace, check_basis_dtype
from curvature.linalg._validate import (
    check_count,
    check_finite,
    check_generator,
    check_square,
    check_start,
    check_tolerances,
    rounding_level,
    working_dtype,
)
from curvature.linop import MatrixLike
from curvature.results import EigenPairs, Status

__all__ = ["ThickRestartLanczos", "Which"]

Which = Literal["LA", "SA", "LM", "BE"]

_STATE = ("before", "since", "tried", "least", "fell")
_NEAR = 10.0  # times its goal: where a residual that no longer falls may be held up by a rounded basis
_CHANCE = 2  # steps after which a random direction does no longer lie far from a wanted eigenspace by chance


class ThickRestartLanczos:
    """The solver behind `eigsh`, where the arguments are documented.

    `run` may be called again with a larger limit and goes on where it was; `state_dict` can be saved with `torch.save`
    and loaded into a solver made with the same arguments, which then takes the same steps as this one would have.

    Example:
        >>> A = torch.diag(torch.arange(100.0))
        >>> solver = ThickRestartLanczos(A, 2, rtol=1e-4, generator=torch.Generator().manual_seed(0))
        >>> solver.run(max_matvecs=10).status.name
        'MAX_MATVECS'
        >>> state = solver.state_dict()
        >>> later = ThickRestartLanczos(A, 2, rtol=1e-4, generator=torch.Generator())
        >>> later.load_state_dict(state)
        >>> torch.equal(later.run().eigenvalues, solver.run().eigenvalues)
        True
    """

    def __init__(
        self,
        A: MatrixLike,
        k: int,
        *,
        which: Which = "LA",
        rtol: float = 1e-3,
        atol: float = 0.0,
        v0: Tensor | None = None,
        generator: torch.Generator,
        num_basis: int | None = None,
        block_size: int = 1,
        deflate: EigenPairs | Tensor | None = None,
        basis_device: torch.device | str | None = None,
        basis_dtype: torch.dtype | None = None,
        certify: bool = False,
        callback: Callable[[int, str], None] | None = None,
    ) -> None:
        n = check_square(A)
        basis_dtype = check_basis_dtype(A, basis_dtype)
        check_generator(A, generator)
        known = _known_directions(A, deflate)
        check_count("block_size", block_size, 1, n)
        check_tolerances(rtol, atol)
        start = check_start(A, v0, block_size, generator)
        start_size = start.shape[1]
        least = max(k + block_size + 1, start_size)
        _check(n - known.shape[1], k, which, num_basis, least)
        self.A, self.k, self.which = A, k, which
        self.rtol, self.atol, self.block_size, self.start_size = rtol, atol, block_size, start_size
        self.certify, self.callback = certify or basis_dtype != working_dtype(A), callback
        size = max(2 * k + 1, 20, k + 2 * block_size, start_size + block_size) if num_basis is None else num_basis
        self.size = min(n - known.shape[1], size)
        measures: dict[str, Any] = {
            "size": self.size,
            "num_directions": start_size,
            "known": known,
            "generator": generator,
            "device": A.device if basis_device is None else torch.device(basis_device),
        }
        self.space = (
            KrylovSpace(A, **measures)
            if basis_dtype == working_dtype(A)
            else RoundedSpace(A, basis_dtype=basis_dtype, **measures)
        )
        self.space.start(start.T)
        self._before: Tensor | None = None  # wanted eigenvalues when a random direction was last tried, ...
        self._since = 0  # ... the products spent when these were new, ...
        self._tried = 0  # ... and those spent when it was tried
        self._least = torch.inf  # largest residual in units of its goal, where rounding of the basis is near, ...
        self._fell = 0  # ... and the products spent when it last fell

    def run(self, *, max_matvecs: int | None = None) -> EigenPairs:
        """Go on until the pairs have converged or `max_matvecs` products, those of earlier runs included, are spent.

        Raises:
            InputError: if the limit leaves no room for a step.
            NonFiniteError: if a product is not finite.
        """
        certificate = self.k if self.certify else 0
        limit = max(10 * self.space.n, 1000) if max_matvecs is None else max_matvecs
        if limit <= certificate:
            raise InputError(
                f"max_matvecs must be at least {certificate + 1}{' with certify=True' * self.certify}, got {limit}."
            )
        look = self._look()
        while not self._converged(look) and not self._stagnated(look) and (width := self._width(limit - certificate)):
            self._advance(look, width)
            look = self._look()
            if self.callback is not None:
                self.callback(self.space.num_matvecs, f"{int(look.done.sum())} of {self.k} eigenpairs")
        return self._result(look)

    def widen(self, block_size: int) -> None:
        """Go on with blocks of so many columns, where more columns turned out to be cheap; nothing done is lost.

        Raises:
            InputError: if the basis leaves no room for them.
        """
        check_count("block_size", block_size, self.block_size, max(self.block_size, self.size - self.k - 1))
        self.space.widen(block_size)
        self.block_size = block_size

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run: tensors and numbers, as long as the basis is full."""
        own = {name: getattr(self, f"_{name}") for name in _STATE}
        return {**self.space.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a solver that was made with the same arguments.

        Raises:
            InputError: if the state is one of another problem.
        """
        self.space.load_state_dict(state)
        for name in _STATE:
            setattr(self, f"_{name}", state[name])

    def _look(self) -> _Look:
        theta, S, residuals = self.space.ritz()
        places = _wanted(theta, self.k, self.which)
        return _Look(theta, S, residuals, places, residuals[places] <= self._goal(theta[places]))

    def _tolerance(self, values: Tensor) -> Tensor:
        return self._asked(values, self.space.rounding())

    def _asked(self, values: Tensor, rounding: float) -> Tensor:
        return (self.rtol * values.abs()).clamp_min(max(self.atol, rounding))

    def _goal(self, values: Tensor) -> Tensor:
        """Return how far residuals of the recurrence are to fall: where the basis is rounded, not below its noise."""
        tolerance = self._tolerance(values)
        if not isinstance(self.space, RoundedSpace):
            return tolerance
        noise = self.space.noise_of(values)
        return torch.maximum((tolerance**2 - (2 * noise) ** 2).clamp_min(0).sqrt(), noise)

    def _stagnated(self, look: _Look) -> bool:
        """Whether residuals have come near the noise of a rounded basis and no longer fall."""
        if not isinstance(self.space, RoundedSpace) or len(look.places) < self.k or bool(look.done.all()):
            return False
        ratio = float((look.residuals[look.places] / self._goal(look.theta[look.places])).max())
        if ratio > _NEAR or ratio < 0.9 * self._least:
            self._least, self._fell = min(ratio, self._least), self.space.num_matvecs
        return self.space.num_matvecs - self._fell >= 2 * self.size

    def _converged(self, look: _Look) -> bool:
        space = self.space
        if len(look.places) < self.k or not bool(look.done.all()):
            return False
        if space.count == space.dimension:
            return True
        if self._before is None:
            return not space.exhausted()
        if not space.exhausted():
            patience = space.num_matvecs - self._since >= self.size  # for noise, in which nothing gets known well
            return patience or (space.num_matvecs - self._tried > _CHANCE and self._no_rival(look))
        return not self._moved(look)

    def _moved(self, look: _Look) -> bool:
        """Whether the wanted eigenvalues are others than when a random direction was last tried."""
        before, now = self._before, look.theta[look.places]
        return before is None or len(before) < self.k or bool((before - now).abs().max() > 10 * self.space.rounding())

    def _no_rival(self, look: _Look) -> bool:
        """Whether what grows from a random direction is known well enough to have no better pair."""
        outside = torch.ones(len(look.theta), dtype=torch.bool)
        outside[look.places] = False
        unknown = (outside & (look.residuals > self.space.noise())).nonzero()[:, 0]
        rivals = unknown[_wanted(look.theta[unknown], 2 if self.which == "BE" else 1, self.which)]
        theta = look.theta[rivals]
        gap = (theta[:, None] - look.theta[look.places]).abs().amin(dim=1)
        return bool((look.residuals[rivals] <= torch.maximum(self._tolerance(theta), 0.1 * gap)).all())

    def _width(self, limit: int) -> int:
        """Return how many products come next; none if the limit or the whole space is reached."""
        space = self.space
        left, room = limit - space.num_matvecs, space.dimension - space.count
        if space.count == 0:
            return min(self.start_size, left, room)  # the whole start block at once
        width = min(self.block_size, room)
        return width if width <= left else 0  # no part of a block, so that a longer run takes the same steps

    def _advance(self, look: _Look, width: int) -> None:
        space, aim = self.space, look.S[:, look.places[~look.done]]
        if space.count + width > self.size:
            kept = _num_kept(self.k, int(look.done.sum()), self.size, width)
            basis = look.S[:, _wanted(look.theta, kept, self.which)]
            space.restart(basis)
            aim = basis.T @ aim
        if space.count > 0 and space.exhausted():
            self._since = space.num_matvecs if self._moved(look) else self._since
            self._before, self._tried = look.theta[look.places], space.num_matvecs
        space.step(width, aim)

    def _result(self, look: _Look) -> EigenPairs:
        space, places = self.space, look.places.flip(0)
        values, S = look.theta[places], look.S[:, places]
        U = space.vectors(S)
        norms = torch.hypot(look.residuals[places], space.coupling(S)).clamp_min(space.rounding())
        tolerance, inexact = self._tolerance(values), space.num_known > 0
        if isinstance(space, RoundedSpace):
            values, U, R = self._refined(U)
            norms = torch.linalg.vector_norm(R, dim=0).double().cpu()
            tolerance = self._asked(values, rounding_level(self.A) * space.norm)
            outside = torch.linalg.vector_norm(space.U.to(R) @ R, dim=0).double().cpu()
            inexact = inexact and bool((norms**2 - outside**2 <= tolerance**2).all())
        elif self.certify:
            R = self._product(U) - U * values.to(U)
            norms = torch.linalg.vector_norm(R, dim=0).double().cpu()
        converged = norms <= tolerance
        status = Status.CONVERGED
        if not self._converged(look) and not self._stagnated(look):
            status = Status.MAX_MATVECS
        elif not bool(converged.all()):
            status = Status.DEFLATION_INEXACT if inexact else Status.STAGNATED
        return EigenPairs(
            eigenvalues=values.to(U),
            eigenvectors=U,
            residual_norms=norms.to(U),
            converged=converged.to(self.A.device),
            num_matvecs=space.num_matvecs + (len(values) if self.certify else 0),
            status=status,
            rtol=self.rtol,
        )

    def _refined(self, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, vectors and residuals of the span of U, columns of a rounded basis, by products with it."""
        assert isinstance(self.space, RoundedSpace)
        U = orthonormalise(U, self.space.U.T.to(U))
        AU = self._product(U)
        H = (U.T @ AU).double().cpu()
        values, Y = torch.linalg.eigh((H + H.T) / 2)
        values, Y = values.flip(0), Y.flip(1).to(U)
        U = U @ Y
        return values, U, AU @ Y - U * values.to(U)

    def _product(self, U: Tensor) -> Tensor:
        """Return A U for the vectors of the result."""
        return check_finite(self.A @ U.to(self.A.dtype), self.space.num_matvecs + U.shape[1]).to(U)


class _Look(NamedTuple):
    """What the basis says about the pairs that are wanted."""

    theta: Tensor  # (m,), Ritz values, ascending
    S: Tensor  # (m, m), their coefficients in the basis
    residuals: Tensor  # (m,)
    places: Tensor  # (at most k,), the wanted among them, ascending
    done: Tensor  # of the same length: whether the residual is below its tolerance


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


def _num_kept(k: int, num_done: int, size: int, width: int) -> int:
    """Return how many Ritz vectors survive a restart: the more of them converged, the more of the next ones.

    ARPACK's rule with a larger share at the end, which saved 2 % of the products over 20 spectra.
    """
    room = size - k
    kept = size // 2 if k == 1 else k + min(num_done + room // 10, int(0.7 * room))
    return max(1, min(kept, size - width))


def _known_directions(A: MatrixLike, deflate: EigenPairs | Tensor | None) -> Tensor:
    """Return the directions to keep out, (n, p), orthonormal."""
    n = A.shape[0]
    if deflate is None:
        return torch.zeros(n, 0, dtype=working_dtype(A), device=A.device)
    U = deflate.eigenvectors[:, deflate.converged] if isinstance(deflate, EigenPairs) else deflate
    if U.ndim != 2 or U.shape[0] != n or U.shape[1] >= n:
        raise InputError(f"deflate must hold fewer than {n} columns of length {n}, got shape {tuple(U.shape)}.")
    U = U.to(A.device, working_dtype(A))
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    if not bool(((U.T @ U - eye).abs() <= torch.finfo(U.dtype).eps ** 0.5).all()):
        raise InputError("deflate must hold orthonormal columns; make them so with torch.linalg.qr(U)[0].")
    return torch.linalg.qr(U)[0]


def _check(
    n: int,
    k: int,
    which: str,
    num_basis: int | None,
    least: int,
) -> None:
    check_count("k", k, 1, n)
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}.")
    if which == "BE" and k < 2:
        raise InputError("which='BE' asks for pairs of both ends: k must be at least 2, got 1.")
    if num_basis is not None and num_basis < min(n, least):
        raise InputError(
            f"num_basis must be at least {least}, more than k + block_size and no less than v0 has columns, got "
            f"{num_basis}."
        )
