"""Preconditioned stochastic gradients: a low-rank sketch of the curvature, refreshed now and then.

Reference: Frangella, Rathore, Zhao and Udell (2024), SketchySGD: reliable stochastic optimization via randomized
curvature estimates, algorithm 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.newton.evaluations import Evaluations, Linearised
from optimizers.newton.full_batch import FullBatchOptimizer, Move
from optimizers.newton.line_search import Armijo, Line
from optimizers.newton.preconditioners import largest_pairs, sketch_is_due
from optimizers.shared.validate import check_at_least, check_choice, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        loss: `loss(outputs, targets)`.
        process_group: ranks that hold parts of each batch, and count by their loss terms if closures return outputs.
        maximize, seed: as in `FullBatchOptimizer`.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = SketchyNewton([w], rank=2, rho=1e-3)
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: (torch.tensor([1.0, 1000.0]) * w**2).sum())
        >>> float(loss) < 1e-6
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: Literal["hessian", "ggn"] = "hessian",
        rank: int = 10,
        rho: float = 1e-1,
        momentum: float = 0.0,
        refresh_every: int = 50,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice("curvature", curvature, ("hessian", "ggn"))
        if curvature == "ggn" and loss is None:
            raise InputError('curvature="ggn" needs loss=, and a closure that returns (outputs, targets).')
        defaults = {
            "lr": lr,
            "rank": rank,
            "rho": rho,
            "momentum": momentum,
            "refresh_every": refresh_every,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, kind=curvature, loss=loss, process_group=process_group)

    def _validate(self, group: dict[str, Any]) -> None:
        check_at_least("rank", group["rank"], 1)
        check_at_least("refresh_every", group["refresh_every"], 1)
        check_positive("rho", group["rho"])
        if not 0 <= group["momentum"] < 1:
            raise InputError(f"momentum must be in [0, 1), got {group['momentum']}.")

    @property
    def _matrix_is_needed(self) -> bool:
        return sketch_is_due(self, self._flat())

    def _move(self, evaluations: Evaluations, here: Linearised, start: Tensor) -> Move:
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
        line = Line(
            value=lambda t: evaluations.value(start + t * d),
            start=here.loss,
            slope=float(here.gradient @ d),
            noise=4 * torch.finfo(flat.dtype).eps * abs(here.loss),
        )
        searched = Armijo()(line, 1.0)
        solver = "sketch refreshed" if here.matrix is not None else "sketch kept"
        step = searched.step * d if searched.success else None
        return Move(step=step, loss=searched.value, solver=solver, message=searched.message)


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
