"""Linear systems with one matrix that are solved side by side: what their solvers share.

Columns are scaled by powers of two, so that no square of a small gradient underflows. An iteration ends a column when
the residual that it carries along is small; the residual is then recomputed, and where it is not small the column is
iterated again from where it stands, until that no longer helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.checkpoint import NOT_KEPT, Checkpoint
from curvature.linalg.base.validate import (
    check_square,
    check_tolerances,
    leaving_room,
    non_finite_message,
    product_noise,
    with_noise,
    working_dtype,
)
from curvature.linop import MatrixLike
from curvature.results.estimates import Status
from curvature.results.solves import SolveResult

_STATE = ("X", "R", "norms", "history", "steps", "num_matvecs")


class Columns:
    """Right-hand sides of A side by side, and how far each has come; see `cg` for the arguments."""

    def __init__(
        self,
        A: MatrixLike,
        B: Tensor,
        *,
        damping: float,
        rtol: float,
        atol: float,
        max_iterations: int | None,
        callback: Callable[[int, str], None] | None,
    ) -> None:
        check_tolerances(rtol, atol)
        check_damping(damping)
        self.A, self.damping, self.rtol, self.atol, self.callback = A, float(damping), rtol, atol, callback
        self.limit = step_limit(max_iterations, min(A.shape))
        self.dtype, self.num_matvecs = working_dtype(A), 0
        self.B, self.is_vector = right_hand_sides(A, B, A.shape[0])
        self.steps = [0] * self.B.shape[1]
        self.statuses = [Status.CONVERGED] * self.B.shape[1]

    def rescale(self, scale: Tensor) -> None:
        """Divide the columns of B by powers of two."""
        self.scale, self.B = scale, self.B / scale
        self.scales: list[float] = scale.double().tolist()

    def begin(self, norms: list[float], sizes: list[float]) -> None:
        """Note what is to fall and from where, and below which share of `sizes` it is to end."""
        self.norms, self.history = norms, [[norm] for norm in norms]
        self.asked = [max(self.rtol * size, self.atol / c) for size, c in zip(sizes, self.scales, strict=True)]
        asked, norms_of = torch.tensor([self.asked, sizes], dtype=torch.float64)
        self.tolerance: list[float] = leaving_room(self.A, asked, norms_of).tolist()

    def report(self, active: Sequence[int]) -> None:
        """Tell the callback how far the open columns are."""
        if self.callback is not None:
            worst = max((self.history[i][-1] / self.tolerance[i] for i in active if self.tolerance[i] > 0), default=0.0)
            done = len(self.norms) - len(active)
            self.callback(self.num_matvecs, f"{done} of {len(self.norms)} solved, residual {worst:.2g} x tolerance")

    def result(self, X: Tensor, norms: list[float], reached: list[bool], **more: Any) -> SolveResult:
        """Return what was reached, in units of the caller; `more` fields come unscaled, columns last."""
        norms = [norm * scale for norm, scale in zip(norms, self.scales, strict=True)]
        return SolveResult(
            x=self.shaped(in_units(X, self.scale)),
            residual_norms=self.shaped(torch.tensor(norms, dtype=self.dtype, device=self.A.device)),
            converged=self.shaped(torch.tensor(reached, device=self.A.device)),
            statuses=tuple(self.statuses),
            num_iterations=tuple(self.steps),
            num_matvecs=self.num_matvecs,
            residual_history=self.ragged(self.history, 1),
            rtol=self.rtol,
            atol=self.atol,
            damping=self.damping,
            **more,
        )

    def shaped(self, X: Tensor) -> Tensor:
        """Return columns last, (..., k), as the caller passed them."""
        return X[..., 0] if self.is_vector else X

    def ragged(self, rows: Sequence[Sequence[float]], power: int) -> Tensor:
        """Return a row for every column, NaN after its end, float64 on the CPU, in units of b^power."""
        longest = max(map(len, rows))
        padded = [
            [value * scale**power for value in row] + [math.nan] * (longest - len(row))
            for row, scale in zip(rows, self.scales, strict=True)
        ]
        table = torch.tensor(padded, dtype=torch.float64)
        return table[0] if self.is_vector else table


class Systems(Columns):
    """(A + damping I) X = B, B scaled to columns of size about 1; arguments and errors are those of `cg`."""

    def __init__(
        self,
        A: MatrixLike,
        B: Tensor,
        *,
        preconditioner: Any,
        x0: Tensor | None,
        saved: Checkpoint = NOT_KEPT,
        **settings: Any,
    ) -> None:
        n, self.saved = check_square(A), saved
        super().__init__(A, B, **settings)
        check_preconditioner(preconditioner, n)
        self.preconditioner, B = preconditioner, self.B
        X, R = torch.zeros_like(B), B
        if x0 is not None:
            if x0.shape != ((n,) if self.is_vector else tuple(B.shape)):
                raise InputError(f"x0 must have the shape of B, got {tuple(x0.shape)}.")
            X = torch.where(B.any(dim=0), x0.reshape(n, -1).to(device=A.device, dtype=self.dtype), 0)
            R = B - self.multiply(X)
        self.rescale(powers_of_two(torch.maximum(B.abs(), R.abs())))
        self.X, self.R = X / self.scale, R / self.scale
        sizes = _norms(self.B)
        self.begin(_norms(self.R), sizes)
        if not all(map(math.isfinite, self.norms)):
            raise NonFiniteError(non_finite_message(self.num_matvecs))
        farthest = max((norm / size for norm, size in zip(self.norms, sizes, strict=True) if size > 0), default=0.0)
        if farthest > torch.finfo(self.dtype).tiny ** -0.25:
            raise InputError(
                f"x0 must be nearer to the solution: its residual is {farthest:.1g} times |b|, and squares of what "
                "should be left of it vanish; leave x0 out, or use float64."
            )

    def multiply(self, X: Tensor) -> Tensor:
        """Return (A + damping I) X in the working dtype, not yet checked to be finite."""
        self.num_matvecs += X.shape[1]
        product = (self.A @ X.to(self.A.dtype)).to(self.dtype)
        return product + self.damping * X if self.damping else product

    def precondition(self, R: Tensor) -> Tensor:
        return preconditioned(self.preconditioner, R)

    def state_dict(self) -> dict[str, Any]:
        """Return what steps change."""
        named = {name: getattr(self, name) for name in _STATE}
        return {**named, "statuses": [status.name for status in self.statuses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.statuses = [Status[name] for name in state["statuses"]]

    def solve(
        self,
        iterate: Callable[[Systems, list[int]], Any],
        take: Callable[[Any], None],
        columns: Sequence[int] | None = None,
    ) -> None:
        """Iterate and recompute residuals until all columns, or those named, are solved or cannot be.

        `iterate` updates X, history, steps and statuses of the open columns; CONVERGED is what it claims. What it
        returns is given to `take`, as it is where a round was read that had been made before.
        """
        chosen = range(len(self.norms)) if columns is None else columns
        active = [i for i in chosen if not self.norms[i] <= self.tolerance[i]]
        while active:
            before, X_before, R_before = list(self.norms), self.X.clone(), self.R.clone()
            state, found = self.saved.piece(partial(self._round, iterate, active))
            self.load_state_dict(state)
            take(found)
            again = []
            for i in active:
                if not math.isfinite(self.norms[i]):
                    raise NonFiniteError(non_finite_message(self.num_matvecs))
                if self.norms[i] <= self.tolerance[i]:
                    self.statuses[i] = Status.CONVERGED
                elif self.statuses[i] is Status.CONVERGED:
                    if self.norms[i] >= before[i]:
                        self.X[:, i], self.R[:, i], self.norms[i] = X_before[:, i], R_before[:, i], before[i]
                    helped = self.norms[i] <= before[i] / 2
                    self.statuses[i] = Status.MAX_ITERATIONS if helped else Status.STAGNATED
                    if helped and self.steps[i] < self.limit:
                        again.append(i)
            active = again

    def _round(self, iterate: Callable[[Systems, list[int]], Any], active: list[int]) -> tuple[dict[str, Any], Any]:
        found = iterate(self, active)
        self.R[:, active] = self.B[:, active] - self.multiply(self.X[:, active])
        self.norms = _norms(self.R)
        return self.state_dict(), found

    def solution(self, **more: Any) -> SolveResult:
        """Return what was reached; products add their rounding error, in units of |A x|, to the residuals."""
        images = torch.linalg.vector_norm(self.B - self.R - self.damping * self.X, dim=0, dtype=torch.float64).cpu()
        self.norms = with_noise(self.A, torch.tensor(self.norms, dtype=torch.float64), images)[0].tolist()
        reached = [norm <= tolerance for norm, tolerance in zip(self.norms, self.asked, strict=True)]
        stood = (Status.CONVERGED, Status.STAGNATED) if product_noise(self.A) else ()
        for i, is_reached in enumerate(reached):
            if self.statuses[i] in stood and not is_reached:
                self.statuses[i] = Status.WITHIN_NOISE
        return self.result(self.X, self.norms, reached, product_noise=product_noise(self.A) or None, **more)


def step_limit(max_iterations: int | None, n: int) -> int:
    """Return the most steps that may be taken."""
    if max_iterations is not None and max_iterations < 0:
        raise InputError(f"max_iterations must not be negative, got {max_iterations}.")
    return max(10 * n, 1000) if max_iterations is None else max_iterations


def indefinite(square: float) -> InputError:
    """Return the error of a preconditioner that has shown r'P^-1 r <= 0."""
    return InputError(
        f"preconditioner must be symmetric positive definite, got r'P^-1 r = {square:.2g} for a residual r."
    )


def right_hand_sides(A: MatrixLike, B: Tensor, m: int) -> tuple[Tensor, bool]:
    """Return right-hand sides as (m, k) in the working dtype, and whether they were a vector."""
    if not isinstance(B, Tensor) or B.ndim not in (1, 2) or B.shape[0] != m or B.numel() == 0:
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise InputError(f"right-hand sides must be a vector ({m},) or a block ({m}, k), k >= 1, got {got}.")
    if B.device != A.device:
        raise InputError(f"right-hand sides must be on the device of A, {A.device}, got {B.device}.")
    if not B.dtype.is_floating_point or not bool(torch.isfinite(B).all()):
        raise InputError("right-hand sides must be real and finite; got infinity, NaN or another kind of number.")
    return B.detach().reshape(m, -1).to(working_dtype(A)), B.ndim == 1


def powers_of_two(B: Tensor) -> Tensor:
    """Return for every column the power of two at its largest entry, 1 for zero: dividing by it loses nothing."""
    largest = B.abs().amax(dim=0)
    return torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(B)), 1.0)


def in_units(X: Tensor, scale: Tensor) -> Tensor:
    """Return the columns of X times their scales; refuse solutions that the dtype cannot hold."""
    info = torch.finfo(X.dtype)
    largest = X.abs().amax(dim=0).double() * scale.double()
    lost = largest[(largest > info.max) | ((largest > 0) & (largest < info.tiny))]
    if len(lost):
        raise NonFiniteError(
            f"a solution has entries of up to {float(lost[0]):.1g}, but {X.dtype} holds sizes between {info.tiny:.1g} "
            f"and {info.max:.1g}; multiply the right-hand side by a power of two (the solution scales with it), or use "
            "float64."
        )
    return X * scale


def _norms(X: Tensor) -> list[float]:
    norms: list[float] = torch.linalg.vector_norm(X, dim=0, dtype=torch.float64).tolist()
    return norms


def check_damping(damping: float) -> None:
    """Refuse what is no shift; a negative one is, for indefinite matrices."""
    if not math.isfinite(damping):
        raise InputError(f"damping must be finite, got {damping}.")


def check_preconditioner(preconditioner: Any, n: int) -> None:
    """Refuse what cannot multiply n rows."""
    shape = getattr(preconditioner, "shape", (n, n))
    if preconditioner is not None and (tuple(shape) != (n, n) or not hasattr(preconditioner, "__matmul__")):
        raise InputError(f"preconditioner must have shape ({n}, {n}) and a product `@`, got {preconditioner!r:.80}.")


def preconditioned(preconditioner: Any, R: Tensor) -> Tensor:
    """Return P^-1 R, or R itself without a preconditioner."""
    if preconditioner is None:
        return R
    return (preconditioner @ R.to(getattr(preconditioner, "dtype", R.dtype))).to(R)
