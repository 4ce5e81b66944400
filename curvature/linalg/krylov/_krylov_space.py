"""The bounded basis that thick-restart Lanczos works in, with exact residuals through restarts and for any block width.

Rows of one buffer hold orthonormal directions: first U, known directions that are kept out, then the basis V, then the
residual directions P, so that

    A V = V T + P C + U D,    T = V'AV,    C = P'AV,    D = U'AV.

A Ritz pair (theta, V s) therefore has the residual norm (|C s|^2 + |D s|^2)^(1/2), whatever was done before. A step
turns directions of P into directions of V by multiplying them; a restart replaces V by V S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvature.environment.memory import drop_pages
from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.orthonormal import gram_schmidt
from curvature.linalg.base.places import Place, empty_rows, normal_rows
from curvature.linalg.base.validate import non_finite_message, rounding_level, unit_of, working_dtype
from curvature.linalg.krylov._completeness import Bound
from curvature.linop import MatrixLike
from curvature.sharding.tensors import held

Tolerance: TypeAlias = "Callable[[Tensor], Tensor]"  # of the residuals, by Ritz value
_TINY = 1e-37  # keeps a start of zero zero
_NOISE = 1e4 * torch.finfo(torch.float64).eps  # what products leave of an invariant space, relative to |A|
_MORE, _SMALL = 16, 1 << 25  # rows to add at a time where the buffer holds no more than so many numbers
_STATE = ("T", "C", "D", "num_known", "num_matvecs", "norm", "_injected")
_COLUMNS = 1 << 16  # coordinates that a restart treats at a time


def most_rows(size: int, grown: int, n: int) -> int:
    """Return the rows of n entries held at most where a buffer of `size` grows to `grown`: it is copied on the way."""
    if grown <= size:
        return size
    return max(2 * size, grown) if grown * n <= _SMALL else 2 * grown - 1


class KrylovSpace:
    """U, V and P as rows at `place`; T, C and D in float64 on the CPU, so that a step waits for the device once."""

    def __init__(
        self,
        A: MatrixLike,
        *,
        size: int,
        num_directions: int,
        known: Tensor,
        generator: torch.Generator,
        place: Place,
    ) -> None:
        self.A, self.generator, self._place = A, generator, place
        self._sharding = getattr(A, "sharding", None)
        if self._sharding is not None and A.device.type != "cpu" and place != A.device:
            raise InputError("a basis of sharded vectors is held where they are; leave basis_device out.")
        self.dtype = working_dtype(A)
        self.n = int(A.shape[0])
        self.num_known = known.shape[1]
        self.rows = self._allocate(known, size + num_directions)
        self.count = 0
        self.num_directions = 0
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.C = torch.zeros(0, 0, dtype=torch.float64)
        self.D = torch.zeros(self.num_known, 0, dtype=torch.float64)
        self.num_matvecs = 0
        self.norm = 0.0
        self._injected = False
        self._frame: Tensor | None = None  # the directions that a chain began with, in terms of P, ...
        self._chained = self._correction = torch.zeros(0, 1, dtype=torch.float64)  # ... and of the newest of V

    def _allocate(self, known: Tensor, size: int) -> Tensor:
        """Return one buffer, so that nothing is copied as the basis grows, with U in its first rows."""
        self.first = self.num_known
        rows = empty_rows(self.first + size, self.n, self.dtype, self._place, self._sharding)
        rows[: self.first] = known.T.to(rows)
        return rows

    @property
    def V(self) -> Tensor:
        return self.rows[self.first : self.first + self.count]

    @property
    def P(self) -> Tensor:
        first = self.first + self.count
        return self.rows[first : first + self.num_directions]

    @property
    def dimension(self) -> int:
        """How large V can grow before it spans the complement of U."""
        return self.n - self.num_known

    def rounding(self) -> float:
        """Residual norms below this are rounding."""
        return rounding_level(self.A) * self.norm

    def noise(self) -> float:
        """Residual norms that products with an invariant space may leave, no less than rounding."""
        return max(self.rounding(), _NOISE * self.norm)

    def exhausted(self) -> bool:
        """Whether V is invariant but for noise: what comes next is a random direction."""
        return self.num_directions == 0 or bool(torch.linalg.matrix_norm(self.C) <= self.noise())

    def start(self, X: Tensor) -> None:
        """Begin with the span of the rows of X; with random directions if nothing of it lies outside U."""
        X = X.to(self.rows.device, self.dtype)
        N, R, _ = self._orthonormalise(X / torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_min(_TINY), 0)
        self._set_directions(N, _used(R.cpu()))
        self.C = torch.zeros(self.num_directions, 0, dtype=torch.float64)
        if self.num_directions == 0:
            self.inject(len(X))

    def step(self, width: int, aim: Tensor | None = None) -> None:
        """Move up to `width` directions from P to V, by products with them; random ones if there are none.

        The directions that carry most of the residuals of V `aim` go first.
        """
        self._frame = None
        self.absorb(self._product(self.propose(width, aim)))

    def _product(self, X: Tensor) -> Tensor:
        """Return A X, with as little of a basis on disk in memory as can be."""
        if self._place == "disk":
            drop_pages(held(self.rows))
        return self.A @ X.to(self.A.device, self.A.dtype)

    def propose(self, width: int, aim: Tensor | None = None) -> Tensor:
        """Return the directions that a step multiplies, (n, at most width), so that somebody else can."""
        if self.count > 0 and not self._injected and self.exhausted():
            self.inject(width)
        elif aim is not None and self.count > 0 and self.num_directions > width:
            self._sort_directions(self.C @ self._weights(aim))
        return self._wide(self.P[:width]).T

    def absorb(self, AX: Tensor) -> None:
        """Move the proposed directions X from P to V, given A X."""
        width = AX.shape[1]
        self._injected = False
        old, new, rest = self.count, self.count + width, self.num_directions - width
        self._reserve(self.first + new + rest + width)
        self.num_matvecs += width
        coupled = self.C[:width].any(dim=0).nonzero()
        recent = int(coupled[0]) if len(coupled) else old
        unit = unit_of(AX, self.num_matvecs, first=self.norm == 0)
        W = AX.T.to(self.rows.device, self.dtype)
        N, R, H = self._orthonormalise(
            W if unit == 1 else W / unit, new + rest, least=self.rounding() / unit, recent=recent
        )
        packed = unit * torch.cat([H, R]).double().cpu()
        if not bool(torch.isfinite(packed).all()):
            raise NonFiniteError(non_finite_message(self.num_matvecs))
        taken = self.num_known + new + rest
        H, R = packed[:taken], packed[taken:]
        used = _used(R)[: self.n - taken]
        D, H, G = H.split([self.num_known, new, rest])
        T = torch.zeros(new, new, dtype=torch.float64)
        T[:old, :old], T[:, old:], T[old:, :old] = self.T, H, H[:old].T
        T[old:, old:] = (H[old:] + H[old:].T) / 2
        C = torch.zeros(rest + len(used), new, dtype=torch.float64)
        C[:rest, :old], C[:rest, old:], C[rest:, old:] = self.C[width:], G, R[used]
        self.T, self.C, self.D = T, C, torch.cat([self.D, D], dim=1)
        if self._frame is not None:
            self._chained = self._frame[:, :width]
            self._frame = torch.nn.functional.pad(self._frame[:, width:], (0, len(used)))
        self.count = new
        self._set_directions(N, used, after=rest)
        self.norm = max(self.norm, float(torch.linalg.matrix_norm(H, 2)))

    def begin_chain(self, bound: Bound, tolerance: Tolerance) -> None:
        """Put a uniform random direction first in P, where the chain of `_completeness` begins."""
        self._clear()
        self._frame = torch.eye(self.num_directions, dtype=torch.float64)
        self._correction = self.schur_correction(bound, tolerance)
        self.inject()

    def schur_correction(self, bound: Bound, tolerance: Tolerance) -> Tensor:
        """Return K with P'K P = R (b - T)^-1 R', R the residuals of the Ritz pairs that have not converged."""
        theta, S, residuals = self.ritz()
        is_open = residuals > tolerance(theta)
        C, gap = self.C @ self._weights(S[:, is_open]), bound.value - theta[is_open]
        return (C / torch.where(gap == 0, bound.sign * _TINY, gap)) @ C.T

    def far_bound(self, bound: Bound, other: Bound, tolerance: Tolerance) -> Bound:
        """Return `other`, moved inwards by as much as the Schur complements of the two bounds differ."""
        K, K_other = (self.schur_correction(b, tolerance) for b in (bound, other))
        return Bound(other.sign, other.value - other.sign * float(torch.linalg.matrix_norm(K - K_other, 2)))

    def extend_chain(self) -> tuple[float, float]:
        """Take the next step of the chain by one product; return its alpha and its beta."""
        if not self._injected:
            self._sort_directions(self._ahead())
        self.absorb(self._product(self._wide(self.P[:1]).T))
        alpha = self.T[-1, -1] + (self._chained.T @ self._correction @ self._chained)[0, 0]
        squared = self._newest_squared()
        return float(alpha) / squared, float(torch.linalg.vector_norm(self._ahead())) / squared**0.5

    def _ahead(self) -> Tensor:
        """Return, in terms of P, what the Schur complement makes of the newest direction outside V."""
        assert self._frame is not None
        return self.C[:, -1:] + self._frame.T @ (self._correction @ self._chained)

    def _newest_squared(self) -> float:
        return 1.0

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, ascending, their coefficients in V, and their residual norms outside U."""
        theta, S = torch.linalg.eigh(self.T)
        self._note_norm(theta)
        return theta, S, torch.linalg.vector_norm(self.C @ S, dim=0)

    def _note_norm(self, theta: Tensor) -> None:
        if len(theta):
            self.norm = max(self.norm, float(theta.abs().max()))

    def coupling(self, S: Tensor) -> Tensor:
        """Return what U, if it is not quite invariant, adds to the residuals of V S."""
        return torch.linalg.vector_norm(self.D @ self._weights(S), dim=0)

    def image(self, S: Tensor) -> Tensor:
        """Return A V S, (n, k), for coefficients S of `ritz`, as the recurrence knows it."""
        parts = torch.cat([self.D, self.T, self.C]).to(self.rows) @ S.to(self.rows)
        return (self.rows[: len(parts)].T @ parts).to(self.A.device)

    def restart(self, S: Tensor) -> None:
        """Keep V S only, S with orthonormal columns."""
        P = self.P.clone()
        weights = S.T.to(self.rows)
        for part in held(self.V).split(_COLUMNS, dim=1):  # in place, so that no second basis is held
            part[: len(weights)] = weights @ part
        self.T, self.C, self.D = S.T @ self.T @ S, self.C @ S, self.D @ S
        self.count = len(weights)
        self.P.copy_(P)

    def vectors(self, S: Tensor) -> Tensor:
        """Return V S, (n, k), on the device of A."""
        return (self.V.T @ S.to(self.rows)).to(self.A.device)

    def final(self, S: Tensor, keep: bool) -> Tensor:
        """Return V S; if the rows are not kept, they are given up."""
        U = self.vectors(S)
        if not keep:
            self.give_up()
        return U

    def give_up(self) -> None:
        """Let go of the rows; what T, C and D say remains."""
        self.rows = self.rows.new_empty(0, self.n)

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return all that a later run needs to go on, tensors and numbers only."""
        last = self.first + self.count + self.num_directions
        own = {name: getattr(self, name) for name in _STATE}
        frame = (self._frame, self._chained, self._correction)
        rows = self.rows[:last].clone() if copy else self.rows[:last]
        return {"rows": rows, **own, "generator": self.generator.get_state(), "frame": frame}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned for a space of these measures."""
        rows = state["rows"]
        if (rows.shape[1], rows.dtype) != (self.n, self.rows.dtype) or state["num_known"] != self.num_known:
            raise InputError(
                f"the state holds {tuple(rows.shape)} directions of {rows.dtype}, {state['num_known']} of them "
                f"deflated; here they have {self.n} entries of {self.rows.dtype}, {self.num_known} deflated: make the "
                "solver with the arguments of the one that was saved."
            )
        self._reserve(len(rows))
        self.rows[: len(rows)] = rows.to(self.rows)
        self.T, self.C, self.D = (state[name].clone() for name in "TCD")
        self.count, self.num_directions = len(self.T), len(self.C)
        self.num_matvecs, self.norm, self._injected = state["num_matvecs"], state["norm"], state["_injected"]
        self.generator.set_state(state["generator"])
        self._frame, self._chained, self._correction = state["frame"]

    def _set_directions(self, N: Tensor, use: list[int], *, after: int = 0) -> None:
        """Let P be its first `after` rows and the rows `use` of N."""
        first = self.first + self.count + after
        self.rows[first : first + len(use)] = self._stored(N if len(use) == len(N) else N[use])
        self.num_directions = after + len(use)

    def _sort_directions(self, parts: Tensor) -> None:
        """Rotate P so that its first directions carry most of `parts`, columns in terms of P; drop those A V misses."""
        U, _, _ = torch.linalg.svd(parts)
        C = U.T @ self.C
        U = U[:, torch.linalg.vector_norm(C, dim=1) > self.rounding()]
        self._set_directions(U.T.to(self.rows.device, self.dtype) @ self._wide(self.P), list(range(U.shape[1])))
        self.C = U.T @ self.C
        self._frame = None if self._frame is None else self._frame @ U

    def inject(self, width: int = 1) -> None:
        """Put uniform random directions of the complement of U and V first in P; nothing that P carries is dropped."""
        self._clear()
        old = self.num_directions
        self._reserve(self.first + self.count + old + width)
        X = normal_rows(self.A, width, self.generator)
        N, R, H = self._orthonormalise(X.to(self.rows.device), self.count + old, recent=0)
        del X
        R, new = R.double().cpu(), _used(R.cpu())
        parts = torch.cat([H.double().cpu()[self.num_known + self.count :], R[new]])
        Q, _ = torch.linalg.qr(parts, mode="complete")
        Q = Q[:, : old + len(new)]
        self._set_directions(N, new, after=old)
        for part, added in zip(
            held(self.P).split(_COLUMNS, dim=1), held(N).split(_COLUMNS, dim=1), strict=True
        ):  # in place
            P = torch.cat([self._wide(part[:old]), added[new]])
            part.copy_(self._stored(Q.T.to(P) @ P))
        self._measure(self.count)
        self.C = Q.T @ torch.cat([self.C, self.C.new_zeros(len(new), self.count)])
        self._frame = None if self._frame is None else self._frame @ Q[:old]
        self._injected = True

    def _clear(self) -> None:
        """Drop the directions that carry nothing but rounding."""
        if self.num_directions:
            self._sort_directions(self.C @ self._weights(torch.eye(self.count, dtype=torch.float64)))

    def _reserve(self, num_rows: int) -> None:
        """Make room for so many rows in all."""
        if num_rows <= len(self.rows):
            return
        used = self.first + self.count + self.num_directions
        more = _MORE if num_rows * self.n <= _SMALL else 0
        rows = empty_rows(num_rows + more, self.n, self.rows.dtype, self._place, self._sharding)
        rows[:used] = self.rows[:used]
        self.rows = rows

    def _measure(self, old: int) -> None:
        """Note that rows changed, those of V and P from `old` on."""

    def _stored(self, X: Tensor) -> Tensor:
        """Return rows as the buffer holds them."""
        return X

    def _wide(self, rows: Tensor) -> Tensor:
        """Return rows of the buffer in the working dtype."""
        return rows

    def _weights(self, S: Tensor) -> Tensor:
        """Return the weights of V in what S combines, coefficients of `ritz`."""
        return S

    def _orthonormalise(
        self, W: Tensor, count: int, *, least: float = 0.0, recent: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return N, R, H with W = H'B + R'N, B = U and the next `count` rows; without waiting for a GPU.

        Block Gram-Schmidt, twice. A row that leaves nothing but rounding, or no more than `least`, is zero in N and in
        R. Reference: Giraud, Langou and Rozloznik (2005). Where W has no part but rounding in the rows of V before
        `recent`, the first time needs the others only.
        """
        if recent is not None and len(W) == 1 and W.device.type == "cpu" and self.num_known == 0:
            found = self._orthonormalise_one(W, count, floor_of(W, least), recent)
            if found is not None:
                return found
        basis, floor = self.rows[: self.num_known + count], floor_of(W, least)
        H = basis @ W.T
        N, R = gram_schmidt(torch.addmm(W, H.T, basis, alpha=-1), floor)
        again = basis @ N.T
        N, R_again = gram_schmidt(N.addmm_(again.T, basis, alpha=-1), floor.new_tensor(dependent_share(W)))
        return N, R_again @ R, H + again @ R

    def _orthonormalise_one(
        self, W: Tensor, count: int, floor: Tensor, recent: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Do it for one row, first among the recent rows, then among all; None if this was not enough."""
        basis = self.rows[:count]
        H = W.new_zeros(count, 1)
        H[recent:] = basis[recent:] @ W.T
        W = torch.addmm(W, H[recent:].T, basis[recent:], alpha=-1)
        before = float(torch.linalg.vector_norm(W))
        again = basis @ W.T
        W.addmm_(again.T, basis, alpha=-1)
        norm = torch.linalg.vector_norm(W)
        if not float(norm) > max(0.5 * before, 10 * float(floor)):  # NaN, too
            return None
        return W.div_(norm), norm.reshape(1, 1), H + again


def floor_of(W: Tensor, least: float) -> Tensor:
    """Return the norm below which what projections leave of a row of W is rounding."""
    return (dependent_share(W) * torch.linalg.vector_norm(W, dim=1).amax()).clamp_min(least)


def dependent_share(W: Tensor) -> float:
    """Return the share of a row that is left of it by rounding where it depends on others."""
    return 10 * torch.finfo(W.dtype).eps


def _used(R: Tensor) -> list[int]:
    """Return which rows Gram-Schmidt left something of."""
    return [j for j, r in enumerate(R.diagonal().tolist()) if r != 0]
