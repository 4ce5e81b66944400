"""Natural gradients: steepest descent in the metric of the model's outputs.

Reference: Amari (1998), Natural gradient works efficiently in learning; Mueller and Zeinhofer (2023), Achieving high
accuracy with PINNs via energy natural gradient descent; Goldshlager, Abrahamsen and Lin (2024), A Kaczmarz-inspired
approach to accelerate the optimization of neural network wavefunctions (SPRING); Guzman-Cordero, Dangel, Goldshlager
and Zeinhofer (2025), Improving energy natural gradient descent through Woodbury, momentum, and randomization;
Frangella, Tropp and Udell (2023), Randomized Nystrom preconditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.low_rank.nystrom import nystrom
from curvature.linalg.systems.cg import cg
from curvature.linop import Composed
from optimizers.newton.dense_jacobian import DampedLeastSquares, Jacobian, dense_jacobian
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.newton.line_search import LineSearch
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NaturalGradient"]

_STREAM = 16  # of the seed: the sketch


class NaturalGradient(FullBatchOptimizer):
    """Steps from (G + lambda I) d = -g, G the Gauss-Newton matrix: the Fisher matrix where the loss is a likelihood.

    - `loss` given: closures return (outputs, targets), and conjugate gradients solve with products.
    - no `loss`: closures return residuals r, the loss is |r|^2 / 2 and G = J'J, as in energy natural gradients. Solved
      directly in the smaller of the two spaces; with fewer residuals than parameters d = -J'(J J' + lambda I)^-1 r.
      With momentum mu (SPRING) d minimises |J d + r|^2 + lambda |d - mu d_before|^2:

          d = mu d_before - J'(J J' + lambda I)^-1 (r + mu J d_before)

      With `rank` it is solved at random instead: conjugate gradients, preconditioned by a Nystrom approximation of J J'
      (or J'J) of that rank from a fresh sketch at each step. They take few steps where the eigenvalues beyond the rank
      are below lambda, and end at `rtol` of the right-hand side whatever the rank.

    Without line search the loss is not looked at, as stochastic batches ask for.

    Args:
        params: parameters or groups of them.
        lr: factor on the step; the first t of a line search.
        damping: lambda; units of G.
        momentum: mu, in [0, 1); for residuals.
        line_search: as for `NewtonCG`; `Grid()` for energy natural gradients. None takes t = lr.
        max_norm: largest length of a step without line search; None for any.
        loss: see above.
        rank: of the randomised solution; None solves directly, by a QR decomposition of m n min(m, n) operations.
            Pays from some thousand residuals and parameters on. Without `jacobian`, products differentiate the closure
            and J is never made.
        jacobian: as for `LevenbergMarquardt`.
        rtol: of conjugate gradients; `last_step.solver` says whether they reached it.
        max_iterations: of conjugate gradients.
        process_group: ranks that hold parts of each batch, and count by their loss terms if closures return outputs;
            not for residuals.
        seed: of the sketches.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = NaturalGradient([w], damping=1e-6)
        >>> loss = optimizer.step(lambda: torch.tensor([1.0, 30.0]) * w)
        >>> bool((w.detach().abs() < 1e-4).all())
        True
    """

    _kept = (*FullBatchOptimizer._kept, "line_search", "jacobian")
    _late_settings = FullBatchOptimizer._late_settings | {"rank": None}
    _fractions = ("momentum",)
    _least: ClassVar[dict[str, float]] = {"max_iterations": 1, "damping": 0}

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        damping: float = 1e-3,
        momentum: float = 0.0,
        line_search: LineSearch | None = None,
        max_norm: float | None = None,
        loss: Callable[..., Tensor] | None = None,
        rank: int | None = None,
        jacobian: Jacobian | None = None,
        rtol: float = 1e-5,
        max_iterations: int = 250,
        process_group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        kind: Literal["ggn", "residuals"] = "residuals" if loss is None else "ggn"
        if kind == "ggn" and (momentum != 0 or jacobian is not None or rank is not None):
            raise InputError("momentum, rank and jacobian belong to residuals: leave loss out.")
        self.line_search, self.jacobian = line_search, jacobian
        defaults: Group = {"lr": lr, "damping": damping, "momentum": momentum, "max_norm": max_norm, "rtol": rtol}
        defaults |= {"max_iterations": max_iterations, "rank": rank, "seed": seed}
        super().__init__(params, defaults, kind, loss=loss, process_group=process_group)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if group["max_norm"] is not None and not group["max_norm"] > 0:
            raise InputError(f"max_norm must be positive, or None, got {group['max_norm']}.")
        rank = group["rank"]
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise InputError(f"rank must be an integer >= 1, or None, got {rank!r}.")
        if rank is not None and not group["damping"] > 0:
            raise InputError("a randomised solution needs damping > 0; rank=None takes 0, too.")

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group = self.param_groups[0]
        if self.kind == "ggn":
            settings = {name: group[name] for name in ("damping", "rtol", "max_iterations")}
            found = cg(here.operator, -here.gradient, **settings)
            d, solver = found.x, found.status.value
        else:
            d, solver = self._in_residual_space(evaluations, here)
        if not bool(d.isfinite().all()):
            message = "the step is not finite: the damped matrix is singular; raise damping"
            return Move(None, here.loss, solver, message)
        rates = self._rates(evaluations.flat)
        initial = rates if isinstance(rates, float) else 1.0
        if not isinstance(rates, float):
            d = rates * d
        if self.line_search is None:
            step = initial * d
            length = float(torch.linalg.vector_norm(step))
            if group["max_norm"] is not None and length > group["max_norm"]:
                step = step * (group["max_norm"] / length)
            return Move(step=step, loss=math.nan, solver=solver, message="taken without a look at the loss")

        found_t = self.line_search(evaluations.line(here, d), initial)
        if found_t.step == 0:
            if group["momentum"] > 0:
                self._remember(evaluations.flat, natural_direction=torch.zeros_like(d))
            return Move(None, here.loss, solver, found_t.message)
        return Move(step=found_t.step * d, loss=found_t.value, solver=solver, message=found_t.message)

    def _in_residual_space(self, evaluations: Evaluations, here: Linearised) -> tuple[Tensor, str]:
        """Return d and how it was found."""
        group, flat = self.param_groups[0], evaluations.flat
        J, r = here.least_squares
        matrix: Any = J if group["rank"] is not None and self.jacobian is None else dense_jacobian(J, self.jacobian)
        mu, before = group["momentum"], self._recall(flat, "natural_direction")
        before = torch.zeros_like(here.gradient) if mu == 0 or before is None else mu * before
        b = -(r + matrix @ before) if mu > 0 else -r
        if group["rank"] is None:
            found = DampedLeastSquares(matrix, torch.ones_like(here.gradient)).solve(b, float(group["damping"]))
            solver = "solved directly"
        else:
            found, solver = self._randomised(matrix, b, self._generator(flat, _STREAM))
        d = before + found
        if mu > 0 and bool(d.isfinite().all()):
            self._remember(flat, natural_direction=d)
        return d, solver

    def _randomised(self, J: Any, b: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
        """Return J'(J J' + lambda I)^-1 b, in the smaller of the two spaces, and how it was found."""
        group = self.param_groups[0]
        tall, damping = J.shape[0] >= J.shape[1], float(group["damping"])
        A = Composed(J.T, J) if tall else Composed(J, J.T)
        sketch = nystrom(A, min(group["rank"], min(J.shape)), num_tests=0, generator=generator)
        settings = {"damping": damping, "rtol": group["rtol"], "max_iterations": group["max_iterations"]}
        # with less damping than rounding of I - U U' the preconditioner would be indefinite
        rounding = 16 * A.shape[0] ** 0.5 * torch.finfo(b.dtype).eps * float(sketch.eigenvalues[0])
        P = sketch.preconditioner(max(damping, rounding))
        found = cg(A, J.T @ b if tall else b, preconditioner=P, **settings)
        steps = f"{found.num_iterations[0]} steps of conjugate gradients, {found.status.value}"
        return found.x if tall else J.T @ found.x, steps
