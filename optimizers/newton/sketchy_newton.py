"""Preconditioned stochastic gradients: a low-rank sketch of the curvature, refreshed now and then.

Reference: Frangella, Rathore, Zhao and Udell (2024), SketchySGD: reliable stochastic optimization via randomized
curvature estimates, algorithm 3.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import Curvature, FullBatchOptimizer, Move
from optimizers.newton.line_search import Armijo
from optimizers.newton.preconditioners import largest_pairs, sketch_is_due
from optimizers.shared.base import Common, Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SketchyNewton"]


class SketchyNewton(FullBatchOptimizer):
    """Steps -lr eta (U |diag(values)| U' + rho I)^-1 m: m an average of gradients, U the largest eigenpairs of A.

    A, the Hessian or the Gauss-Newton matrix of the batch at hand (or of `curvature_closure`), is sketched anew every
    `refresh_every` steps. eta = 1 / (2 lambda_1), with lambda_1 the largest eigenvalue of the preconditioned matrix, by
    power iteration at each refresh, takes the place of a learning rate. Between refreshes the curvature may grow, and
    the step is shortened until the loss of its own batch falls by enough (`Armijo`); where m points uphill for that
    batch, its gradient takes the place of m.

    Cost of a step: a gradient and a loss for each length tried; of a refresh rank + 5 + 10 products. Memory: the
    sketch, rank vectors.

    Args:
        params: parameters or groups of them.
        lr: factor on the step.
        curvature: "hessian", for closures that return the loss; "ggn", for (outputs, targets) with `loss`.
        rank: eigenpairs, largest in magnitude.
        rho: added to their magnitudes, and the curvature that all else is taken to have; units of the matrix.
        momentum: of the average of gradients; 0 for none.
        refresh_every: steps between refreshes.
        shared: loss, process_group, maximize, seed: see `optimizers.shared.base.Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = SketchyNewton([w], rank=2, rho=1e-3)
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: (torch.tensor([1.0, 1000.0]) * w**2).sum())
        >>> float(loss) < 1e-6
        True
    """

    _fractions = ("momentum",)
    _least: ClassVar[dict[str, float]] = {"rank": 1, "refresh_every": 1}
    _positive = ("rho",)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: Curvature = "hessian",
        rank: int = 10,
        rho: float = 1e-1,
        momentum: float = 0.0,
        refresh_every: int = 50,
        **shared: Unpack[Common],
    ) -> None:
        defaults: Group = {"lr": lr, "rank": rank, "rho": rho, "momentum": momentum, "refresh_every": refresh_every}
        super().__init__(params, defaults, curvature, **shared)

    @property
    def _matrix_is_needed(self) -> bool:
        return sketch_is_due(self, self._flat())

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat = self.param_groups[0], evaluations.flat
        values, U = largest_pairs(self, flat, here.matrix, self._generator(flat, 14))
        rho = float(group["rho"])
        if here.matrix is not None:
            largest = _preconditioned_norm(here.matrix, values, U, rho, self._generator(flat, 15))
            rate = torch.tensor(0.5 / max(largest, torch.finfo(flat.dtype).tiny))
            for p in flat.params:
                self.state[p]["sketch_rate"] = rate.clone()
        m = here.gradient
        if group["momentum"] > 0:
            before = self._recall(flat, "momentum")
            m = m if before is None else group["momentum"] * before + (1 - group["momentum"]) * m
            self._remember(flat, momentum=m)
        factor = -self._rates(flat) * float(self.state[flat.params[0]]["sketch_rate"])
        d = factor * _power(values, U, rho, -1.0, m)
        if m is not here.gradient and not float(here.gradient @ d) < 0:
            d = factor * _power(values, U, rho, -1.0, here.gradient)
        searched = Armijo()(evaluations.line(here, d), 1.0)
        solver = "sketch refreshed" if here.matrix is not None else "sketch kept"
        step = searched.step * d if searched.success else None
        return Move(step, searched.value, solver, searched.message)


def _preconditioned_norm(A: Any, values: Tensor, U: Tensor, rho: float, generator: torch.Generator) -> float:
    """Return the largest |eigenvalue| of P^(-1/2) A P^(-1/2), from below, by 10 power iterations."""
    v = torch.randn(U.shape[0], generator=generator, dtype=U.dtype, device=U.device)
    size = 0.0
    for _ in range(10):
        v = v / torch.linalg.vector_norm(v)
        v = _power(values, U, rho, -0.5, A @ _power(values, U, rho, -0.5, v))
        size = float(torch.linalg.vector_norm(v))
        if not 0 < size < math.inf:
            break
    return size


def _power(values: Tensor, U: Tensor, rho: float, exponent: float, v: Tensor) -> Tensor:
    """Return (U |diag(values)| U' + rho I)^exponent v.

    What is left beside U is multiplied by rho^exponent, rounding included: it is taken out of v twice.
    """
    inside = U.T @ v
    rest = v - U @ inside
    rest = rest - U @ (U.T @ rest)
    return U @ ((values.abs() + rho) ** exponent * inside) + rho**exponent * rest
