"""Thick-restart Lanczos as an object: to be run for a while, saved, and run on.

Every step multiplies a few residual directions and looks at the Ritz pairs; when the basis is full, the best Ritz
vectors are kept and the rest dropped. When the wanted pairs have converged, a chain of steps from a random direction
orthogonal to the basis bounds the probability that an eigenvalue was missed (`_completeness`); what it finds joins the
basis, so that repeated and clustered eigenvalues come as often as they are there.

Reference: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems; Stewart (2001), A
Krylov-Schur algorithm for large eigenproblems. Differs from ARPACK in that convergence is looked at after every
product, start blocks may have any width, and residuals are those of the pairs returned, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.memory import return_unused
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.places import BasisDevice, entries_held, place_of, spare_bytes
from curvature.linalg.base.validate import (
    check_confidence,
    check_count,
    check_finite,
    check_square,
    check_start,
    check_tolerances,
    checked_once,
    column_norms,
    leaving_room,
    product_noise,
    rounding_level,
    with_noise,
    working_dtype,
)
from curvature.linalg.krylov._completeness import Bound, Chain, bounds_of
from curvature.linalg.krylov._krylov_space import KrylovSpace
from curvature.linalg.krylov._ritz_selection import (
    Look,
    Which,
    basis_size,
    check_memory,
    check_problem,
    known_directions,
    num_kept,
    wanted,
)
from curvature.linalg.krylov._rounded_space import RoundedSpace, check_basis_dtype
from curvature.linalg.krylov._sharded_space import ShardedSpace
from curvature.linop import AnyMatrix, MatrixName, as_matrix
from curvature.results.estimates import EigenPairs, Status

_STATE = ("least", "fell", "spent", "num_chains", "closed", "beyond", "held")
_NEAR = 10.0  # times its goal: where a residual that no longer falls may be held up by a rounded basis
_CHAIN = 8  # steps of a chain, as a rule
_FIRST = 0.8  # of the failure probability for the first chain, as a rule the only one


class ThickRestartLanczos:
    """The solver behind `eigsh`, where the arguments are documented.

    `run` may be called again with a larger limit and goes on where it was; `state_dict` can be saved with `torch.save`
    and loaded into a solver made with the same arguments, which then takes the same steps as this one would have.

    Examples:
        >>> A = torch.diag(torch.arange(100.0))
        >>> solver = ThickRestartLanczos(A, 2, rtol=1e-4, generator=0)
        >>> solver.run(max_matvecs=10).status.name
        'MAX_MATVECS'
        >>> state = solver.state_dict()
        >>> later = ThickRestartLanczos(A, 2, rtol=1e-4, generator=torch.Generator())
        >>> later.load_state_dict(state)
        >>> torch.equal(later.run().eigenvalues, solver.run().eigenvalues)
        True
    """

    @checked
    def __init__(
        self,
        A: AnyMatrix,
        k: int,
        *,
        matrix: MatrixName = "hessian",
        which: Which = "LA",
        rtol: float = 1e-3,
        atol: float = 0.0,
        v0: Tensor | None = None,
        generator: AnyGenerator,
        num_basis: int | None = None,
        block_size: int = 1,
        deflate: EigenPairs | Tensor | None = None,
        basis_device: BasisDevice = None,
        basis_dtype: torch.dtype | None = None,
        certify: bool = False,
        confidence: float | None = 0.99,
        callback: Callable[[int, str], None] | None = None,
    ) -> None:
        A = as_matrix(A, matrix)
        n = check_square(A)
        basis_dtype = check_basis_dtype(A, basis_dtype)
        generator = as_generator(generator, A.device)
        known = known_directions(A, deflate)
        check_count("block_size", block_size, 1, n)
        check_tolerances(rtol, atol)
        check_confidence(confidence)
        start = check_start(A, v0, block_size, generator)
        start_size = start.shape[1]
        least = max(k + block_size + 1, start_size)
        check_problem(n - known.shape[1], k, which, num_basis, least)
        self.A, self.k, self.which = A, k, which
        self.rtol, self.atol, self.block_size, self.start_size = rtol, atol, block_size, start_size
        self.certify = certify or basis_dtype != working_dtype(A)
        self.confidence, self.callback = confidence, callback
        self.size = min(n - known.shape[1], num_basis or basis_size(k, block_size, start_size))
        held = place_of(basis_device, A.device)
        row = entries_held(A) * basis_dtype.itemsize
        check_memory((self.size + start_size + 2 * k) * row, held, basis_dtype == working_dtype(A))
        directions: dict[str, Any] = {"num_directions": start_size, "known": known, "generator": generator}
        if basis_dtype != working_dtype(A):
            directions["basis_dtype"] = basis_dtype
        space = ShardedSpace.kind(A) if basis_dtype == working_dtype(A) else RoundedSpace
        self.space: KrylovSpace = space(A, size=self.size, place=held, **directions)
        self.space.start(start.T)
        spare = spare_bytes(held, size_given=num_basis is not None)  # for a chain
        self._room = max(self.size + start_size, min(n, spare // row))
        self._chain: Chain | None = None
        self._held: tuple[Tensor, ...] = ()  # values, coefficients and residuals of the pairs when it began
        self._spent, self._num_chains = 0.0, 0  # of the failure probability, in chains that found something
        self._closed: list[float] = []  # signs of the ends where nothing was missed
        self._beyond = 0  # Ritz values beyond the bounds when the chain began: more say that something had been missed
        self._least = torch.inf  # largest residual in units of its goal, where rounding of the basis is near, ...
        self._fell = 0  # ... and the products spent when it last fell

    @one_matrix
    def run(self, *, max_matvecs: int | None = None, keep_basis: bool = True) -> EigenPairs:
        """Go on until the pairs have converged or `max_matvecs` products, those of earlier runs included, are spent.

        Without `keep_basis` the basis is given up before the pairs are multiplied at the end, and this run is the last.

        Raises:
            InputError: if the limit leaves no room for a step, or the basis was given up.
            NonFiniteError: if a product is not finite.
        """
        certificate = self.k if self.certify else 0
        limit = max(10 * self.space.n, 1000) if max_matvecs is None else max_matvecs
        if limit <= certificate:
            raise InputError(
                f"max_matvecs must be at least {certificate + 1}{' with certify=True' * self.certify}, got {limit}."
            )
        if len(self.space.rows) < self.space.count:
            raise InputError("the basis was given up by keep_basis=False; make a new solver.")
        look = self._look()
        while not self._finished(look) and (width := self._width(look, limit - certificate)):
            self._advance(look, width)
            look = self._look()
            if self.callback is not None:
                self.callback(self.space.num_matvecs, f"{int(look.done.sum())} of {self.k} eigenpairs")
        return self._result(look, limit, keep_basis)

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return the state of the run: tensors and numbers, as long as the basis is full; without `copy`, its own."""
        own = {name: getattr(self, f"_{name}") for name in _STATE}
        return {**self.space.state_dict(copy=copy), **own, "chain": self._chain and self._chain.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a solver that was made with the same arguments.

        Raises:
            InputError: if the state is one of another problem.
        """
        self.space.load_state_dict(state)
        for name in _STATE:
            setattr(self, f"_{name}", state[name])
        self._chain = None if state["chain"] is None else Chain.from_state(state["chain"])

    def _look(self) -> Look:
        theta, S, residuals = self.space.ritz()
        places = wanted(theta, self.k, self.which)
        done = residuals[places] <= self._goal(theta[places])
        look = Look(theta, S, theta[places], S[:, places], residuals[places], done)
        if self._chain is None or self._all_done(look) or self._has_rival(look):
            return look
        # the chain came across values within the tolerance of the last wanted one: the pairs that are done stay
        values, coefficients, norms = self._held
        coefficients = torch.nn.functional.pad(coefficients, (0, 0, 0, len(theta) - len(coefficients)))
        return Look(theta, S, values, coefficients, norms, torch.ones(self.k, dtype=torch.bool))

    def _tolerance(self, values: Tensor) -> Tensor:
        return self._asked(values, self.space.rounding())

    def _asked(self, values: Tensor, rounding: float) -> Tensor:
        return (self.rtol * values.abs()).clamp_min(max(self.atol, rounding))

    def _goal(self, values: Tensor) -> Tensor:
        """Return how far residuals of the recurrence are to fall: where the basis is rounded, not below its noise."""
        tolerance = self._tolerance(values)
        if not isinstance(self.space, RoundedSpace):
            return leaving_room(self.A, tolerance, self.space.norm)
        noise = self.space.noise_of(values)
        return torch.maximum((tolerance**2 - (2 * noise) ** 2).clamp_min(0).sqrt(), noise)

    def _stagnated(self, look: Look) -> bool:
        """Whether residuals have come near the noise of a rounded basis and no longer fall."""
        if not isinstance(self.space, RoundedSpace) or len(look.values) < self.k or bool(look.done.all()):
            return False
        ratio = float((look.residuals / self._goal(look.values)).max())
        if ratio > _NEAR or ratio < 0.9 * self._least:
            self._least, self._fell = min(ratio, self._least), self.space.num_matvecs
        return self.space.num_matvecs - self._fell >= 2 * self.size

    def _finished(self, look: Look) -> bool:
        if not self._all_done(look):
            return self._stagnated(look)
        return self._certified(look) or not self._has_room()

    def _all_done(self, look: Look) -> bool:
        return len(look.values) == self.k and bool(look.done.all())

    def _certified(self, look: Look) -> bool:
        """Whether the chain that runs has shown that nothing was missed; or nobody asked."""
        if self.confidence is None or self.space.count == self.space.dimension:
            return True
        return self._end_certified(look) and self._miss_probability(look) <= 1 - self.confidence

    def _end_certified(self, look: Look) -> bool:
        """Whether the chain has shown that nothing was missed at its end of the spectrum."""
        chain = self._chain
        return chain is not None and not self._has_rival(look) and chain.miss_probability() <= self._allowed()

    def _has_rival(self, look: Look) -> bool:
        """Whether the chain, or the basis that holds it, has come to more Ritz values beyond the bounds."""
        more = self._num_beyond(look.theta, self._held[0]) > self._beyond
        return more or (self._chain is not None and self._chain.rival() is not None)

    def _num_beyond(self, theta: Tensor, values: Tensor) -> int:
        return sum(bound.beyond(theta) for bound in self._bounds(values))

    def _allowed(self) -> float:
        """Return the share of the failure probability that the present chain may take; the shares of all sum to 1."""
        assert self.confidence is not None
        i = self._num_chains
        return (1 - self.confidence) * (_FIRST if i == 1 else (1 - _FIRST) / (i * (i - 1)))

    def _has_room(self) -> bool:
        """Whether the next step of the chain fits into memory."""
        space = self.space
        return self._chain is None or space.count + space.num_directions + 1 <= self._room

    def _width(self, look: Look, limit: int) -> int:
        """Return how many products come next; none if the limit or the whole space is reached."""
        space = self.space
        left, room = limit - space.num_matvecs, space.dimension - space.count
        if space.count == 0:
            return min(self.start_size, left, room)  # the whole start block at once
        width = min(1 if self._all_done(look) else self.block_size, room)
        return width if width <= left else 0  # no part of a block, so that a longer run takes the same steps

    def _advance(self, look: Look, width: int) -> None:
        if self._all_done(look):
            self._extend_chain(look)
            return
        if self._chain is not None:
            self._give_up_chain()
        space, aim = self.space, look.coefficients[:, ~look.done]
        if space.count + width > self.size:
            aim = self._restart(look, num_kept(self.k, int(look.done.sum()), self.size, width)).T @ aim
        space.step(width, aim)

    def _restart(self, look: Look, kept: int) -> Tensor:
        """Keep the best Ritz vectors; return their coefficients."""
        basis = look.S[:, wanted(look.theta, kept, self.which)]
        self.space.restart(basis)
        return basis

    def _extend_chain(self, look: Look) -> None:
        """Take the next step of the chain; the first one of another if there is none, or it found something."""
        space = self.space
        if self._chain is not None and self._end_certified(look):
            self._spent += self._chain.miss_probability()
            self._closed, self._chain = [*self._closed, self._chain.bound.sign], None
        elif self._chain is not None and self._has_rival(look):
            self._give_up_chain()
        if self._chain is None:
            kept = self._room - space.num_directions - _CHAIN - 1
            if space.count > kept:
                self._restart(look, max(self.k, kept))
                look = self._look()
                if not self._all_done(look):  # by the rounding of a narrow basis
                    return
            self._num_chains += 1
            bound, *others = self._open_bounds(look)
            self._held = look.values, look.coefficients, look.residuals
            self._beyond = self._num_beyond(look.theta, look.values)
            far = space.far_bound(bound, others[0], self._goal) if others else None
            self._chain = Chain(bound, space.dimension - space.count, far)
            space.begin_chain(bound, self._goal)
        self._chain.add(*space.extend_chain(), space.noise())

    def _open_bounds(self, look: Look) -> list[Bound]:
        """Return the bounds without a certificate, that which needs the longer chain first: it may do for both."""
        bounds = [bound for bound in self._bounds(look.values) if bound.sign not in self._closed]
        return sorted(bounds, key=lambda bound: bound.distance(look.theta))

    def _give_up_chain(self) -> None:
        """Note that the chain found something, so that all ends have to be looked at again."""
        self._spent += self._allowed()
        self._closed, self._chain = [], None

    def _bounds(self, theta: Tensor) -> tuple[Bound, ...]:
        """Return the ends beyond which no eigenvalue may be missed: the last wanted values and their tolerance."""
        return bounds_of(theta, self.which, self._tolerance(theta).clamp_min(self.space.noise()))

    def _result(self, look: Look, limit: int, keep_basis: bool) -> EigenPairs:
        space = self.space
        values, S = look.values.flip(0), look.coefficients.flip(1)
        norms = torch.hypot(look.residuals.flip(0), space.coupling(S)).clamp_min(space.rounding())
        tolerance, inexact = self._tolerance(values), space.num_known > 0
        done, num_checks, confirmed = self._all_done(look), 0, self.confidence is None
        if isinstance(space, RoundedSpace):
            values, U, R = space.refined(S, self._product, self.block_size, keep_basis)
            norms, num_checks, confirmed = torch.linalg.vector_norm(R, dim=0).double().cpu(), len(values), True
            tolerance = self._asked(values, rounding_level(self.A) * space.norm)
            outside = torch.linalg.vector_norm(space.U.to(R) @ R, dim=0).double().cpu()
            inexact = inexact and bool((norms**2 - outside**2 <= tolerance**2).all())
        else:
            if space.rows.device.type == "cpu" and space.rows.nbytes >= spare_bytes(space.rows.device, size_given=True):
                return_unused()  # what the products left: the check and the result need vectors beside the basis
            once = done and not confirmed and not self.certify and limit > space.num_matvecs
            U, gap = self._vectors(S, once, keep_basis)
            num_checks, wrong = int(once), torch.full_like(tolerance, self.certify, dtype=torch.bool)
            found = norms
            if once:
                found, wrong = checked_once(norms, gap, tolerance, space.rounding() * self.k**0.5)
            if self.certify or (once and limit > space.num_matvecs + int(wrong.sum())):
                norms, confirmed = found, True
                norms[wrong] = self._computed(U, values, wrong)
                num_checks += int(wrong.sum())
        norms, is_noisy = with_noise(self.A, norms, space.norm)
        converged = norms <= tolerance
        certified = done and self._certified(look) and confirmed
        if not done and not self._stagnated(look):
            status = Status.MAX_MATVECS
        elif not bool(converged.all()):
            status = Status.WITHIN_NOISE if is_noisy else Status.DEFLATION_INEXACT if inexact else Status.STAGNATED
        else:
            status = Status.CONVERGED if certified else Status.UNCERTIFIED
        return EigenPairs(
            eigenvalues=values.to(U),
            eigenvectors=U,
            residual_norms=norms.to(U),
            converged=converged.to(self.A.device),
            num_matvecs=space.num_matvecs + num_checks,
            status=status,
            rtol=self.rtol,
            miss_probability=self._miss_probability(look),
            product_noise=product_noise(self.A) or None,
        )

    def _miss_probability(self, look: Look) -> float:
        if self.confidence is None:
            return math.nan
        if not self._all_done(look):
            return 1.0
        if self.space.count == self.space.dimension:
            return 0.0
        if self._chain is None or self._has_rival(look):
            return 1.0
        last = len(self._open_bounds(look)) == 1
        return min(
            1.0, self._spent + (self._chain.miss_probability() if last else self._chain.miss_probability_of_all())
        )

    def _vectors(self, S: Tensor, once: bool, keep_basis: bool) -> tuple[Tensor, float]:
        """Return V S and how far a product with a random sum of its columns is from what the recurrence says of it."""
        space = self.space
        z = torch.randint(0, 2, (S.shape[1], 1), generator=torch.Generator().manual_seed(self.k)).to(S) * 2 - 1
        image = space.image(S @ z) if once else S
        U = space.final(S, keep_basis)
        return U, float(torch.linalg.vector_norm(image.sub_(self._product(U @ z.to(U))))) if once else math.nan

    def _computed(self, U: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
        """Return the residual norms of chosen pairs, which are multiplied once more, `block_size` at a time."""
        found = values.new_empty(0)
        for places in chosen.nonzero()[:, 0].split(self.block_size) if bool(chosen.any()) else ():
            X = U[:, places.to(U.device)]
            R = self._product(X).addcmul_(X, values[places].to(X), value=-1)
            found = torch.cat([found, column_norms(R, self.space.num_matvecs).double().cpu()])
        return found

    def _product(self, U: Tensor) -> Tensor:
        """Return A U, in memory of its own."""
        AU = check_finite(self.A @ U.to(self.A.dtype), self.space.num_matvecs + U.shape[1]).to(U)
        return AU.clone() if AU.data_ptr() == U.data_ptr() else AU
